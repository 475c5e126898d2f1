"""Every column of every table of units once more: from raw arrays, in NumPy float64, unit by unit, by the definitions.

Nothing of the program is imported. `check` compares the tables of one site with it: counts, choices and extremes
exactly, moments to rounding, what is read from bins within the bound that its column states. A column that is not
checked is an error, so that none is forgotten.

Shapes: N rows, S positions, P presentations that count for a unit, G groups, D fan-in, U units, C classes.
"""
