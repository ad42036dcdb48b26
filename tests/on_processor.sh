#!/bin/sh
# Run a command as on a processor that has no more than one kind of instructions:
#     tests/on_processor.sh default|avx2|avx512 COMMAND [ARGUMENT ...]
case $1 in
    default) onednn=SSE41 ;;
    avx2) onednn=AVX2 ;;
    avx512) onednn=ALL ;;
    *) echo "on_processor.sh: error: unknown capability '$1'; choose one of default, avx2, avx512" >&2; exit 2 ;;
esac
export ATEN_CPU_CAPABILITY="$1" ONEDNN_MAX_CPU_ISA=$onednn
shift
exec "$@"
