"""Training and evaluation on Lightning; `acckv` itself never imports Lightning."""
