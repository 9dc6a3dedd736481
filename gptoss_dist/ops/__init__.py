"""Every hot operation: a slow reference and fast back ends in one table, chosen by name."""
