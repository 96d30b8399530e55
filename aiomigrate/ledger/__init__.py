"""The two metadata tables: records, codec, history, founding, the lease and the writer."""
