"""Conversion of pretrained models: teachers, the distillation of a teacher into its conversion, its evaluation and tables."""
