"""The attentions that BSBR is compared with: one variant a file, each a function, its slow reference and its module."""
