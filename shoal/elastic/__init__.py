"""Workers come and go, and the run goes on with the same bits: docs/elastic.md."""
