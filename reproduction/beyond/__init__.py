"""Studies that go past the documents, in the same form."""
