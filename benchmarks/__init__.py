"""What the project is measured with; not part of the package. ``results.csv`` holds every figure measured."""
