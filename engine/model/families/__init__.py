"""One screen per family: metadata -> ModelSpec, and a file's tensor names -> canonical names."""
