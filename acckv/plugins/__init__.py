"""acckv inside other people's evaluation frameworks; none of them is needed to import this package."""
