# Completes settings of `python -m evals.run` and `python -m evals.certify`; of other commands of python, names of files.
# Hydra's own script knows `python file.py` only. What there is to choose from is Hydra's answer.
_bsbr_complete() {
    COMPREPLY=()
    [[ ${COMP_LINE:0:COMP_POINT} =~ \ -m\ evals\.(run|certify)\ (.*)$ ]] || return
    local typed=${BASH_REMATCH[2]//--dry-run/}
    COMPREPLY=($(COMP_LINE="python run.py $typed" "${COMP_WORDS[0]}" -m evals.run -sc query=bash 2>/dev/null))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _bsbr_complete python python3
