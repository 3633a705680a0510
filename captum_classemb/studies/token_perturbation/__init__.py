"""Class tokens without the context, context tokens without the class."""
