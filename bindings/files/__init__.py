"""Files and directories: safetensors read and written, outputs that appear whole, locks."""
