"""Two small tasks of lmms-eval about generated clips, which run offline."""
