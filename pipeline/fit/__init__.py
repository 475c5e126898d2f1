"""How a model learns: rows in shuffled order, losses, schedules, several models of one shape at once."""
