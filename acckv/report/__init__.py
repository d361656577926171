"""The reports of evaluations and calibrations: tables, plots, HTML, model card."""
