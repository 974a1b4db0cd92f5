"""What verbs cost on many devices, read from compiled programs: nothing here is run, and no weights are made."""
