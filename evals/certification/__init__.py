"""The certificate: checks that an attention keeps the contract of `bsbr.interface`.

To add a check, write a function that takes a `Subject` and returns what failed, and list it in `checks.CHECKS`.
"""
