"""The pocket data: real image-text pairs that any machine can fetch, laid out as img2dataset writes CC12M."""
