"""A standing benchmark on pretrained weights: decoder, clips, calibration, tables and a rival, of registries alone."""
