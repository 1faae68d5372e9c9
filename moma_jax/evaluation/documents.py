"""Held-out losses by document, in a small Parquet file of the run: what intervals over documents are made from."""

DOCUMENTS = "documents.parquet"
