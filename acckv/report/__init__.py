"""What an evaluation leaves behind: results file and predictions, tables, plots, model card."""
