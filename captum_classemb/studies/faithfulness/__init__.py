"""Whether maps show what the model uses: several methods compared."""
