"""What IPython sees: the magics, their arguments, and the imports that are warmed up behind them."""
