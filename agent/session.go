package agent

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"skein/manager/api"
)

// Bounds of looking for a leader and of a session.
const (
	// welcomeBound ends an attempt whose manager does not answer.
	welcomeBound = time.Second
	// avoidFor spares an address that did not answer at all while others can be asked.
	avoidFor = 3 * time.Second
	// Between rounds over all managers: full jitter below a quarter of the time without a session, so that a new leader (≤ 4 s) has
	// its agents back within a second and a long outage does not meet a herd.
	retryMin      = 100 * time.Millisecond
	retryEarlyCap = 300 * time.Millisecond
	retryMax      = 3 * time.Second // a healed link serves again within 5 s
	// While no manager says a word, the attempts themselves take their time and nobody is burdened by more of them.
	retrySilent  = time.Second
	maxRedirects = 3
	statusEvery  = 50 * time.Millisecond // at most one batch in this time
	maxRecvBytes = api.MaxMessageBytes   // sets and tables come in parts
	// staleFor is how long a leader of an older term is refused: one that was cut off may not know yet that it is none. Later it is
	// a cluster that was restored from a backup.
	staleFor      = time.Minute
	leaderTrailer = "skein-leader"
	spreadTrailer = "skein-spread-millis"
	spreadMax     = 4 * time.Second // whatever is said: a new leader has given a node up after 5 s
)

var errSilent = errors.New("the manager said nothing within the lease")

// connect keeps a session until ctx ends.
func (a *Agent) connect(ctx context.Context) error {
	lost := time.Now()
	avoid := map[string]time.Time{}
	for ctx.Err() == nil {
		a.spread = 0
		had, silent := a.round(ctx, avoid)
		if had && a.saidGoodbye() {
			close(a.left)
			<-ctx.Done()
			break
		}
		if had {
			lost = time.Now()
		}
		delay := retryDelay(time.Since(lost), a.spread)
		if silent {
			delay = min(delay, retrySilent)
		}
		_ = pause(ctx, delay)
	}
	return ctx.Err()
}

// round asks each manager once, following redirects. It returns after a session was had or nobody gave one, and then tells whether none
// of them even answered.
func (a *Agent) round(ctx context.Context, avoid map[string]time.Time) (had, silent bool) {
	queue, all := a.candidates(avoid), len(a.candidates(nil))
	silent = true
	for redirects := 0; len(queue) > 0 && ctx.Err() == nil; {
		addr := queue[0]
		queue = queue[1:]
		had, leader, err := a.session(ctx, addr)
		if ctx.Err() != nil {
			return had, false
		}
		a.disconnected(addr, had, err)
		switch {
		case had:
			clear(avoid)
			if errors.Is(err, errSilent) { // for a whole lease: who names it as leader after that hears it
				avoid[addr] = time.Now().Add(welcomeBound)
			}
			return true, false
		case errors.Is(err, errSilent):
			avoid[addr] = time.Now().Add(avoidFor) // it is cut off, or its machine is dead: followers may name it for a while
		default:
			silent = false
			if leader != "" && 2*len(avoid) > all {
				clear(avoid) // most were silent, and one is not: it was this node that was cut off
			}
		}
		if leader != "" && leader != addr && redirects < maxRedirects && !time.Now().Before(avoid[leader]) {
			redirects++
			queue = append([]string{leader}, slices.DeleteFunc(queue, func(s string) bool { return s == leader })...)
		}
	}
	return false, silent
}

// candidates are the managers to ask: in random order, the leader as last heard first, those that did not answer just now left out.
func (a *Agent) candidates(avoid map[string]time.Time) []string {
	a.mu.Lock()
	peers := slices.Clone(a.known.managers)
	a.mu.Unlock()
	rand.Shuffle(len(peers), func(i, j int) { peers[i], peers[j] = peers[j], peers[i] })
	slices.SortStableFunc(peers, func(x, y *api.ManagerPeer) int {
		switch {
		case x.Leader == y.Leader:
			return 0
		case x.Leader:
			return -1
		}
		return 1
	})
	var all []string
	for _, p := range peers {
		all = append(all, p.RpcAddr)
	}
	seeds := slices.Clone(a.cfg.Seeds)
	rand.Shuffle(len(seeds), func(i, j int) { seeds[i], seeds[j] = seeds[j], seeds[i] })
	for _, s := range seeds {
		if !slices.Contains(all, s) {
			all = append(all, s)
		}
	}
	good := slices.DeleteFunc(slices.Clone(all), func(s string) bool { return time.Now().Before(avoid[s]) })
	if len(good) == 0 {
		return all
	}
	return good
}

// retryDelay is the pause after a round without a session: the longer there was none, the longer, and as long as the managers without a
// leader say that the herd needs.
func retryDelay(without, spread time.Duration) time.Duration {
	limit := max(min(max(without/4, retryEarlyCap), retryMax), min(spread, spreadMax))
	return retryMin + rand.N(limit-retryMin)
}

// session lives as long as the manager at addr has this node. It tells whether there was one, and whom a follower named as leader.
func (a *Agent) session(ctx context.Context, addr string) (had bool, leader string, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watchdog := time.AfterFunc(welcomeBound, func() { cancel(errSilent) })
	defer watchdog.Stop()

	hello, err := a.hello(ctx)
	if err != nil {
		return false, "", err
	}
	conn, err := a.cfg.Dial(ctx, addr)
	if err != nil {
		return false, "", fmt.Errorf("dial manager %s: %w", addr, err)
	}
	defer conn.Close()
	stream, err := api.NewDispatcherClient(conn).Session(ctx, grpc.MaxCallRecvMsgSize(maxRecvBytes))
	if err != nil {
		return false, "", cause(ctx, err)
	}
	// A refused stream reports its reason on Recv, not on Send.
	_ = stream.Send(&api.AgentMessage{Kind: &api.AgentMessage_Hello{Hello: hello}})
	first, err := stream.Recv()
	if err != nil {
		a.noteSpread(stream.Trailer())
		return false, redirect(stream.Trailer(), err), cause(ctx, err)
	}
	welcome := first.GetWelcome()
	if welcome == nil {
		return false, "", fmt.Errorf("manager %s did not begin with a welcome", addr)
	}
	lease := time.Duration(welcome.LeaseMillis) * time.Millisecond
	every := time.Duration(welcome.HeartbeatMillis) * time.Millisecond
	if every <= 0 || lease < every {
		return false, "", fmt.Errorf("manager %s asks for a heartbeat of %v within a lease of %v", addr, every, lease)
	}
	watchdog.Reset(lease)
	if err := a.follow(welcome.Term); err != nil {
		return false, "", fmt.Errorf("manager %s: %w", addr, err)
	}
	a.spread = 0 // it said so before there was this leader
	a.connected(addr, welcome)
	defer a.tasks.Connected(false)
	if err := a.receive(first); err != nil {
		return true, "", err
	}
	received := make(chan error, 1)
	go func() { // ends with the stream's context, which ends with this call
		received <- a.receiveAll(stream, func() { watchdog.Reset(lease) })
		cancel(nil)
	}()
	sendErr := a.send(ctx, stream, every)
	cancel(nil)
	recvErr := <-received
	if c := context.Cause(ctx); errors.Is(c, errSilent) {
		return true, "", c
	}
	if recvErr != nil && status.Code(recvErr) != codes.Canceled {
		a.noteSpread(stream.Trailer())
		return true, redirect(stream.Trailer(), recvErr), recvErr
	}
	return true, "", sendErr
}

// follow accepts a leader unless a newer one was heard lately.
func (a *Agent) follow(term uint64) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if term < a.term && time.Since(a.termAt) < staleFor {
		return fmt.Errorf("it leads in term %d, and a leader of term %d was heard %v ago: it does not know yet that it was replaced",
			term, a.term, time.Since(a.termAt).Round(time.Millisecond))
	}
	a.term, a.termAt = term, time.Now()
	return nil
}

func (a *Agent) hello(ctx context.Context) (*api.Hello, error) {
	desc, err := a.cfg.Executor.Describe(ctx)
	if err != nil {
		return nil, fmt.Errorf("describe this node: %w", err)
	}
	a.outbox.clear() // first: whatever comes from now on is in the statuses, in the outbox, or in both
	reports := a.tasks.Reports()
	for _, r := range reports[min(len(reports), api.MaxStatusReports):] { // they follow in batches
		a.outbox.addOld(r)
	}
	a.mu.Lock()
	digests := a.known.digests()
	a.mu.Unlock()
	return &api.Hello{
		Hostname: a.cfg.Hostname, DescriptionJson: desc, UnderlayAddr: a.cfg.UnderlayAddr, RpcAddr: a.cfg.RPCAddr,
		Statuses: reports[:min(len(reports), api.MaxStatusReports)], Acks: a.tables.acks(true), Tables: digests, Tls: a.nodeTLS(), Crypt: a.nodeCrypt(),
		FeatureLevel: api.FeatureLevel, Addrs: a.nodeAddrs(),
	}, nil
}

type sessionStream = grpc.BidiStreamingClient[api.AgentMessage, api.ManagerMessage]

func (a *Agent) receiveAll(stream sessionStream, alive func()) error {
	for {
		m, err := stream.Recv()
		if err != nil {
			return err
		}
		alive()
		a.mu.Lock()
		a.termAt = time.Now()
		a.mu.Unlock()
		if err := a.receive(m); err != nil {
			return err
		}
	}
}

// send says what there is to say until the session ends.
func (a *Agent) send(ctx context.Context, stream sessionStream, every time.Duration) error {
	beat := time.NewTicker(every)
	defer beat.Stop()
	var last time.Time
	hold := time.NewTimer(0) // reports wait for it, so that a busy node sends batches
	defer hold.Stop()
	<-hold.C
	var sequence uint64
	leaving := a.leaving
	facts := make(chan *api.NodeFacts)
	go a.tellFacts(ctx, facts)
	for {
		var m *api.AgentMessage
		select {
		case <-ctx.Done():
			return cause(ctx, ctx.Err())
		case <-beat.C:
			sequence++
			m = &api.AgentMessage{Kind: &api.AgentMessage_Heartbeat{Heartbeat: &api.Heartbeat{Sequence: sequence}}}
			if now := a.changedAddrs(); now != nil {
				if err := stream.Send(&api.AgentMessage{Kind: &api.AgentMessage_Addrs{Addrs: now}}); err != nil {
					return err
				}
			}
		case <-a.tables.acked:
			for _, ack := range a.tables.acks(false) {
				if err := stream.Send(&api.AgentMessage{Kind: &api.AgentMessage_Ack{Ack: ack}}); err != nil {
					return err
				}
			}
			continue
		case <-leaving:
			leaving = nil
			a.mu.Lock()
			a.goodbye = true
			a.mu.Unlock()
			m = &api.AgentMessage{Kind: &api.AgentMessage_Goodbye{Goodbye: &api.Goodbye{}}}
		case f := <-facts:
			m = &api.AgentMessage{Kind: &api.AgentMessage_Facts{Facts: f}}
		case <-a.tls:
			m = &api.AgentMessage{Kind: &api.AgentMessage_Tls{Tls: a.nodeTLS()}}
		case <-a.crypt:
			m = &api.AgentMessage{Kind: &api.AgentMessage_Crypt{Crypt: a.nodeCrypt()}}
		case <-a.outbox.wake:
			hold.Reset(max(0, statusEvery-time.Since(last)))
			continue
		case <-hold.C:
			reports, more := a.outbox.take(api.MaxStatusReports)
			if more {
				a.outbox.poke()
			}
			if len(reports) == 0 {
				continue
			}
			last = time.Now()
			m = &api.AgentMessage{Kind: &api.AgentMessage_Statuses{Statuses: &api.StatusBatch{Reports: reports}}}
		}
		if err := stream.Send(m); err != nil {
			return err
		}
	}
}

func (a *Agent) saidGoodbye() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.goodbye
}

func (a *Agent) connected(addr string, w *api.Welcome) {
	a.mu.Lock()
	a.status.Connected, a.status.Leader, a.status.SessionID = true, addr, w.SessionId
	a.status.Since, a.status.Err = time.Now(), ""
	a.mu.Unlock()
	a.cfg.Log.Info("session with the managers", "leader", addr)
	a.tasks.Connected(true)
}

func (a *Agent) disconnected(addr string, had bool, err error) {
	a.mu.Lock()
	a.status.Connected, a.status.SessionID = false, ""
	if had {
		a.status.Since = time.Now()
	}
	if err != nil {
		a.status.Err = err.Error()
	}
	a.mu.Unlock()
	if status.Code(err) == codes.PermissionDenied && a.cfg.OnRefused != nil {
		a.cfg.OnRefused(api.FromGRPC(err))
	}
	if had {
		a.cfg.Log.Warn("session with the managers ended", "leader", addr, "err", err)
	} else {
		a.cfg.Log.Debug("no session", "manager", addr, "err", err)
	}
}

// redirect is the leader that a follower names.
func redirect(trailer metadata.MD, err error) string {
	if status.Code(err) != codes.FailedPrecondition {
		return ""
	}
	if v := trailer.Get(leaderTrailer); len(v) > 0 {
		return v[0]
	}
	return ""
}

// noteSpread keeps what a manager without a leader said of the time that all agents need for their next attempts.
func (a *Agent) noteSpread(trailer metadata.MD) {
	if v := trailer.Get(spreadTrailer); len(v) > 0 {
		if ms, err := strconv.ParseUint(v[0], 10, 31); err == nil {
			a.spread = max(a.spread, time.Duration(ms)*time.Millisecond)
		}
	}
}

// cause prefers the reason for which the context was ended.
func cause(ctx context.Context, err error) error {
	if c := context.Cause(ctx); c != nil && ctx.Err() != nil {
		return c
	}
	return err
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
