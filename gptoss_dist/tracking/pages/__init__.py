"""Pages of HTML about runs: each is one file that needs no network and no other file."""
