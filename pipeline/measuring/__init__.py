"""The measure task: each chunk is read once and shown to every model of a group, and one state stored per cell."""
