# Completes settings of `python -m evals.run` and `python -m evals.certify`, and file names of all other python commands.
# Hydra's own script completes `python file.py` only, so this one asks Hydra for the candidates.
_bsbr_complete() {
    COMPREPLY=()
    [[ ${COMP_LINE:0:COMP_POINT} =~ \ -m\ evals\.(run|certify)\ (.*)$ ]] || return
    local typed=${BASH_REMATCH[2]//--dry-run/}
    COMPREPLY=($(COMP_LINE="python run.py $typed" "${COMP_WORDS[0]}" -m evals.run -sc query=bash 2>/dev/null))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _bsbr_complete python python3
