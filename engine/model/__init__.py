"""What a model is: the spec and the families that read it from files. No numbers of weights live here."""
