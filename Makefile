# The five things a contributor does; .ci/run does all of them, in fresh environments.
.PHONY: setup test lint docs bench

setup:
	pip install -e ".[test,dev,docs]"
	pre-commit install

test:
	pytest

lint:
	ruff check .
	ruff format --check .
	mypy

docs:
	mkdocs build --strict

bench:
	python -m benchmarks.speed_memory --quick --output runs/speed_memory.json
