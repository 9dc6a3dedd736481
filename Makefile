# Five verbs. Each is one line that can be typed without make. `make` alone lists them.
.PHONY: help install test fast check docs

help:
	@sed -n 's/^\([a-z]*\):.*## /make \1	/p' Makefile

install: ## into .venv, or the active virtual environment
	sh launch/install.sh --extras test,dev

test: ## all tests that a change must pass
	sh launch/test.sh

fast: ## the tests that one runs before each commit
	sh launch/test.sh --fast

check: ## lint, format, types, spelling, and a strict build of the documentation
	sh launch/check.sh

docs: ## the documentation as a site in build/site
	sh launch/check.sh docs
