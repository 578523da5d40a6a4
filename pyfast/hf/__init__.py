"""The swap into Hugging Face models: a row of data per family (families.py), a generic forward per kind of module."""
