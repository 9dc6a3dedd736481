"""Hot operations: a slow reference and fast back ends behind one function each."""
