package control

import (
	"encoding/json"
	"time"

	"github.com/moby/moby/api/types/swarm"
)

// Defaults of a spec, as docker shows them with insertDefaults.
const (
	defaultRestartDelay = 5 * time.Second
	defaultMonitor      = 5 * time.Second
	defaultGrace        = 10 * time.Second
)

// insertDefaults fills in what the spec leaves to the system, on a copy of what it points to: stored specs are immutable.
func insertDefaults(spec *swarm.ServiceSpec) error {
	b, err := json.Marshal(spec)
	if err != nil {
		return err
	}
	var full swarm.ServiceSpec
	if err := json.Unmarshal(b, &full); err != nil {
		return err
	}
	if c := full.TaskTemplate.ContainerSpec; c != nil {
		if c.StopGracePeriod == nil {
			c.StopGracePeriod = ptr(defaultGrace)
		}
		if c.DNSConfig == nil {
			c.DNSConfig = &swarm.DNSConfig{}
		}
	}
	t := &full.TaskTemplate
	if t.RestartPolicy == nil {
		t.RestartPolicy = &swarm.RestartPolicy{Condition: swarm.RestartPolicyConditionAny}
	}
	if t.RestartPolicy.Delay == nil {
		t.RestartPolicy.Delay = ptr(defaultRestartDelay)
	}
	if t.RestartPolicy.MaxAttempts == nil {
		t.RestartPolicy.MaxAttempts = ptr(uint64(0))
	}
	if t.Resources == nil {
		t.Resources = &swarm.ResourceRequirements{Limits: &swarm.Limit{}, Reservations: &swarm.Resources{}}
	}
	if t.Placement == nil {
		t.Placement = &swarm.Placement{}
	}
	for _, u := range []**swarm.UpdateConfig{&full.UpdateConfig, &full.RollbackConfig} {
		if full.Mode.ReplicatedJob != nil || full.Mode.GlobalJob != nil {
			break // jobs have none
		}
		if *u == nil {
			*u = &swarm.UpdateConfig{Parallelism: 1, FailureAction: swarm.UpdateFailureActionPause, Order: swarm.UpdateOrderStopFirst}
		}
		if (*u).Monitor == 0 {
			(*u).Monitor = defaultMonitor
		}
	}
	if full.EndpointSpec == nil {
		full.EndpointSpec = &swarm.EndpointSpec{Mode: swarm.ResolutionModeVIP}
	}
	*spec = full
	return nil
}

func ptr[T any](v T) *T { return &v }
