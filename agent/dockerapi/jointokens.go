package dockerapi

import (
	"net/http"
	"time"

	"skein/manager/api"
)

// JoinToken is a join token that is limited in time or uses. Token itself is only in the answer to its making.
type JoinToken struct {
	ID          string
	Token       string `json:",omitempty"`
	Role        string
	Description string `json:",omitempty"`
	CreatedAt   time.Time
	ExpiresAt   *time.Time `json:",omitempty"`
	Uses        uint64     // 0: any number
	Used        uint64
	State       string // good, expired, used up, revoked
}

// JoinTokenRequest asks for a limited join token.
type JoinTokenRequest struct {
	Role        string
	TTL         time.Duration // nanoseconds; 0: for ever
	Uses        uint64        // 0: any number
	Description string
}

func joinToken(t *api.TokenInfo) JoinToken {
	out := JoinToken{ID: t.GetId(), Token: t.GetToken(), Role: t.GetRole(), Description: t.GetDescription(), CreatedAt: time.Unix(0, t.GetCreated()).UTC(),
		Uses: t.GetUses(), Used: t.GetUsed(), State: t.GetState()}
	if t.GetExpires() != 0 {
		at := time.Unix(0, t.GetExpires()).UTC()
		out.ExpiresAt = &at
	}
	return out
}

func (h *handlers) joinTokenCreate(w http.ResponseWriter, r *http.Request) error {
	var req JoinTokenRequest
	if err := readJSON(w, r, &req); err != nil {
		return err
	}
	ctl, err := h.control(r.Context())
	if err != nil {
		return err
	}
	t, err := ctl.CreateJoinToken(r.Context(), &api.JoinTokenRequest{Role: req.Role, TtlNanos: int64(req.TTL), Uses: req.Uses, Description: req.Description})
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusCreated, joinToken(t))
}

func (h *handlers) joinTokenList(w http.ResponseWriter, r *http.Request) error {
	ctl, err := h.control(r.Context())
	if err != nil {
		return err
	}
	list, err := ctl.ListJoinTokens(r.Context(), &api.Empty{})
	if err != nil {
		return err
	}
	out := make([]JoinToken, 0, len(list.GetTokens()))
	for _, t := range list.GetTokens() {
		out = append(out, joinToken(t))
	}
	return writeJSON(w, http.StatusOK, out)
}

func (h *handlers) joinTokenRemove(w http.ResponseWriter, r *http.Request) error {
	ctl, ref, err := h.onObject(r)
	if err != nil {
		return err
	}
	if _, err = ctl.RemoveJoinToken(r.Context(), &api.GetRequest{Ref: ref}); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}
