"""Where files lie: local disks and object stores, reached in one way; who may write there; what is whole there."""
