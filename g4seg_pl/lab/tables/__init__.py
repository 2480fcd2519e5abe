"""The tables of the laboratory, one function each: a `Lab` in, a `Table` out."""
