"""The measurements run over datasets, as the command line offers them."""
