"""*How Do Vision Transformers Work?* (Park & Kim, ICLR 2022): measurements of any vision model."""

import captum_classemb.dynamics.alternet  # noqa: F401  (timm knows its names from here on)
