"""The attentions that BSBR is compared with: one variant a file, each with its functional form, its slow reference and its module."""
