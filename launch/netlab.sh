#!/usr/bin/env bash
# A network on one machine: N namespaces behind token buckets, a rank in each. See docs/comparing.md.
#     sudo launch/netlab.sh up 4 200mbit && sudo launch/netlab.sh run COMMAND... ; sudo launch/netlab.sh down
exec bash "$(dirname "${BASH_SOURCE[0]}")/../ds_lvx/compare/netlab.sh" "$@"
