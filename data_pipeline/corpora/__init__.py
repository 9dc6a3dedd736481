"""Where text comes from: files, records, hub datasets and built-in corpora."""
