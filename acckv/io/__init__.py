"""Files: written atomically, read field by field, fetched from the Hub; and progress on a terminal."""
