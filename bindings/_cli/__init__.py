"""The command line's parts: options, clients, tables, pictures, how errors are told."""
