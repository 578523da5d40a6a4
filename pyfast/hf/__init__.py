"""The swap into Hugging Face models: one row of data per family (families.py), one generic forward per kind of module."""
