# Completes, in bash and in zsh (after: autoload -U bashcompinit compinit && compinit && bashcompinit), the commands of bsbr, the settings
# of its run and certify, the same after `python -m evals.run`, and file names elsewhere. Hydra's own script completes `python file.py`
# only, so this one asks Hydra for the candidates.
_bsbr_complete() {
    COMPREPLY=()
    local line=${COMP_LINE:0:$COMP_POINT} program=${COMP_WORDS[@]:0:1} typed
    case $line in
        *\ -m\ evals.run\ *) typed=${line#* -m evals.run } ;;
        *\ -m\ evals.certify\ *) typed=${line#* -m evals.certify } ;;
        *bsbr\ run\ *) typed=${line#* run } ;;
        *bsbr\ certify\ *) typed=${line#* certify } ;;
        *bsbr\ *\ *) return ;;
        *bsbr\ *) COMPREPLY=($(compgen -W "@COMMANDS@" -- "${line#* }")); return ;;
        *) return ;;
    esac
    typed=${typed//--dry-run/}
    case $program in
        *bsbr) COMPREPLY=($(COMP_LINE="python run.py $typed" "$program" run -sc query=bash 2>/dev/null)) ;;
        *) COMPREPLY=($(COMP_LINE="python run.py $typed" "$program" -m evals.run -sc query=bash 2>/dev/null)) ;;
    esac
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _bsbr_complete bsbr python python3
