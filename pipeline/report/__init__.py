"""How results are shown to a person: tables, pictures and the questions that every run answers."""
