"""Labelled images: `load.load(name)` reads them, from wherever they lie, into an `arrays.Data`."""
