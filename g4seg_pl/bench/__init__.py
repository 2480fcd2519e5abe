"""How close a run comes to the bare networks in time and memory, and what each part costs."""
