"""Tools that tests share and that are no part of the package."""
