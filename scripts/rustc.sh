#!/bin/sh
# What .cargo/config.toml names: compiles, and nothing else.
exec "$@"
