package control_test

import (
	"maps"
	"strings"
)

// The rows of every field; see specs_test.go.

// long is longer than any name may be.
var long = `"` + strings.Repeat("x", 300) + `"`

func serviceScaffold() map[string]string {
	const c = "TaskTemplate.ContainerSpec."
	return map[string]string{
		c + "Mounts[]":            `{"Type":"bind","Source":"/a","Target":"/b"}`,
		c + "Secrets[]":           `{"SecretID":"s","SecretName":"s","File":{"Name":"f"}}`,
		c + "Configs[]":           `{"ConfigID":"s","ConfigName":"s","File":{"Name":"f"}}`,
		c + "Ulimits[]":           `{"Name":"nofile","Soft":1,"Hard":1}`,
		"TaskTemplate.Networks[]": `{"Target":"host"}`,
		"TaskTemplate.Resources.Reservations.GenericResources[]": `{"DiscreteResourceSpec":{"Kind":"gpu","Value":1}}`,
		"EndpointSpec.Ports[]":                 `{"TargetPort":80}`,
		"TaskTemplate.Placement.Preferences[]": `{"Spread":{"SpreadDescriptor":"node.labels.a"}}`,
	}
}

// labelRows are those of every map of labels that Skein's options are among, or not.
func labelRows(options bool) []row {
	rows := []row{
		kept(`app:="x"`), kept(`app:="line\nof two"`), bad(`:="x"`, "want a name"),
		bad(`app:="`+strings.Repeat("x", 4096)+`"`, "at most 4096 bytes"),
	}
	if options {
		rows = append(rows, bad(`skein.colour:="x"`, "unknown option: labels that begin with \"skein.\" are Skein's own"))
	} else {
		rows = append(rows, kept(`skein.colour:="x"`))
	}
	return rows
}

func serviceRows() map[string][]row {
	all := map[string][]row{
		"Name": {kept(`"web-1_b"`), kept(`""`), bad(`"a b"`, `= "a b": name must be valid as a DNS name component`), bad(`"-a"`, "DNS name"), bad(`"a\nb"`, "DNS name"), bad(`"é"`, "DNS name"), bad(long, "name must be 63 characters or fewer"),
			bad(`"a/b"`, "DNS name"), bad(`"a.b"`, "DNS name")},
		"Labels{}":                            labelRows(true),
		"Mode":                                {bad(`{"Replicated":{},"Global":{}}`, "must specify only one service mode"), bad(`{"GlobalJob":{},"ReplicatedJob":{}}`, "must specify only one service mode")},
		"Mode.Replicated.Replicas":            {kept("0"), kept("1000000"), bad("1000001", "= 1000001: more than the limit: want 0 to 1000000"), bad("-1", "= -1")},
		"Mode.Global":                         {kept("{}")},
		"Mode.ReplicatedJob.MaxConcurrent":    {kept("5"), bad("0", "want 1 to 1000000"), bad("1000001", "want 1 to 1000000")},
		"Mode.ReplicatedJob.TotalCompletions": {kept("0"), kept("7"), bad("1000001", "want 0 to 1000000")},
		"Mode.GlobalJob":                      {kept("{}")},
		"UpdateConfig":                        {bad(`{}`, "not supported for jobs", `Mode={"GlobalJob":{}}`)},
		"RollbackConfig":                      {bad(`{}`, "not supported for jobs", `Mode={"ReplicatedJob":{}}`)},
		"EndpointSpec.Mode":                   {kept(`"vip"`), kept(`"dnsrr"`), bad(`"magic"`, "invalid endpoint mode: want vip or dnsrr")},
		"EndpointSpec.Ports[].Name":           {kept(`"http"`), bad(`"a b"`, "printable"), bad(long, "at most 255")},
		"EndpointSpec.Ports[].Protocol":       {kept(`"udp"`), kept(`"sctp"`), bad(`"icmp"`, "want tcp, udp or sctp"), bad(`"TCP"`, "want tcp, udp or sctp")},
		"EndpointSpec.Ports[].TargetPort":     {kept("65535"), bad("0", "want 1 to 65535"), bad("65536", "= 65536: invalid port")},
		"EndpointSpec.Ports[].PublishedPort":  {kept("0"), kept("65535"), bad("65536", "want 1 to 65535"), bad("4294967296", "want a whole number from 0 to 4294967295")},
		"EndpointSpec.Ports[].PublishMode":    {kept(`"host"`), bad(`"wide"`, "want ingress or host"), bad(`"ingress"`, "can't be used with dnsrr mode", `EndpointSpec.Mode="dnsrr"`)},
	}
	for _, more := range []map[string][]row{updateRows("UpdateConfig."), updateRows("RollbackConfig."), taskRows(), containerRows(), processRows(), mountRows()} {
		maps.Copy(all, more)
	}
	all["RollbackConfig.FailureAction"] = []row{kept(`"pause"`), kept(`"continue"`), bad(`"rollback"`, "cannot be rolled back"), bad(`"cry"`, "unrecognized rollback failure action")}
	all["EndpointSpec.Ports"] = []row{bad(`[{"TargetPort":80,"PublishedPort":81},{"TargetPort":82,"PublishedPort":81}]`, "duplicate published ports provided: 81/tcp").named("EndpointSpec.Ports[1].PublishedPort"),
		bad("["+strings.Repeat(`{"TargetPort":80},`, 500)+`{"TargetPort":80}]`, "at most 500")}
	return all
}

func updateRows(p string) map[string][]row {
	return map[string][]row{
		p + "Parallelism":     {kept("0"), kept("18446744073709551615")},
		p + "Delay":           {kept("0"), kept("5000000000"), bad("-5000000000", "= -5s: TaskSpec:")},
		p + "FailureAction":   {kept(`"pause"`), kept(`"continue"`), kept(`"rollback"`), bad(`"cry"`, "want pause, continue or rollback")},
		p + "Monitor":         {kept("1"), bad("-1", "= -1ns: TaskSpec:")},
		p + "MaxFailureRatio": {kept("0.5"), kept("1"), bad("1.5", "cannot be less than 0 or bigger than 1"), bad("-0.1", "cannot be less than 0")},
		p + "Order":           {kept(`"start-first"`), bad(`"sideways"`, "want stop-first or start-first")},
	}
}

func taskRows() map[string][]row {
	const t, r = "TaskTemplate.", "TaskTemplate.Resources."
	memory := []row{kept("4194304"), kept("0"), bad("4194303", "invalid memory value 4194303: Must be at least 4MiB"), bad("-1", "Must be at least 4MiB")}
	cpu := []row{kept("1000000"), bad("1", "= 1: invalid cpu value 1e-09: Must be at least 0.001"), bad("-5", "invalid cpu value")}
	swap := []string{r + `Limits={"MemoryBytes":8388608}`}
	all := map[string][]row{
		t + "Runtime":                   {kept(`"container"`), bad(`"plugin"`, "not supported"), bad(`"x"`, "not supported")},
		t + "ForceUpdate":               {kept("18446744073709551615")},
		t + "ContainerSpec":             {bad("null", "is missing")},
		r + "Limits.NanoCPUs":           cpu,
		r + "Limits.MemoryBytes":        memory,
		r + "Limits.Pids":               {kept("100"), bad("-1", "= -1: want 1 or more")},
		r + "Reservations.NanoCPUs":     cpu,
		r + "Reservations.MemoryBytes":  append(memory, bad("9000000", "more than Limits.MemoryBytes (8388608)", swap...)),
		r + "SwapBytes":                 {kept("0", swap...), kept("-1", swap...), bad("-2", "want 0 or more", swap...), bad("5", "needs a limit of memory")},
		r + "MemorySwappiness":          {kept("100"), kept("-1"), bad("101", "want 0 to 100"), bad("-2", "want 0 to 100")},
		t + "RestartPolicy.Condition":   {kept(`"none"`), kept(`"on-failure"`), kept(`"any"`), bad(`"sometimes"`, "want none, on-failure or any")},
		t + "RestartPolicy.Delay":       {kept("0"), bad("-5000000000", "= -5s: TaskSpec: restart-delay cannot be negative: must be 0 or more")},
		t + "RestartPolicy.MaxAttempts": {kept("0"), kept("18446744073709551615"), bad("-1", "= -1")},
		t + "RestartPolicy.Window":      {kept("1"), bad("-1", "= -1ns: TaskSpec: restart-window cannot be negative")},
		t + "Placement.Constraints[]": {kept(`"node.role==worker"`), kept(`"node.labels.a != b"`), bad(`"node.colour==red"`, "node.colour"), bad(`""`, "want attribute"), bad(`"node.id=="`, "value is missing"),
			bad(`"node.hostname=x"`, "want attribute == value"), bad(`"node.ip==x"`, "neither an address nor a network")},
		t + "Placement.Preferences[].Spread.SpreadDescriptor": {kept(`"engine.labels.az"`), bad(`"x"`, "unknown attribute"), bad(`"node.id"`, "want node.labels.NAME"), bad(`""`, "unknown attribute")},
		t + "Placement.Preferences[].Spread":                  {bad("null", "only spread is known")},
		t + "Placement.MaxReplicas":                           {kept("3"), bad("3", "can only be used with replicated or replicated-job mode", `Mode={"Global":{}}`)},
		t + "Placement.Platforms[].Architecture":              {kept(`"amd64"`), kept(`""`), bad(`"a b"`, "printable"), bad(long, "at most 255")},
		t + "Placement.Platforms[].OS":                        {kept(`"linux"`), bad(`"a\nb"`, "printable")},
		t + "Networks[].Target":                               {kept(`"host"`), bad(`""`, "is missing"), bad(`"ingress"`, "cannot be explicitly attached to the ingress network")},
		t + "Networks":                                        {bad(`[{"Target":"host"},{"Target":"host"}]`, "listed twice").named("TaskTemplate.Networks[1].Target")},
		t + "Networks[].Aliases[]":                            {kept(`"db"`), bad(`"a b"`, "invalid alias"), bad(`""`, "invalid alias"), bad(long, "1 to 253")},
		t + "Networks[].DriverOpts{}":                         {bad(`"x"`, "not supported").named("TaskTemplate.Networks[0].DriverOpts")},
		t + "LogDriver.Name":                                  {kept(`"local"`), kept(`"none"`), bad(`"fluentd"`, "log drivers other than json-file, local and none: not supported")},
		t + "LogDriver.Options{}": {kept(`max-size:="10m"`), bad(`max-size:="huge"`, "want a positive size"), bad(`max-file:="0"`, "want 1 to 1000"), bad(`colour:="x"`, "unknown log opt 'colour'"), bad(`mode:="x"`, "want blocking"),
			bad(`compress:="x"`, "want true or false"), bad(`compress:="true"`, "max-file is less than 2"), bad(`tag:="{{"`, "want a template"), bad(`env-regex:="["`, "want a regular expression"), bad(`max-buffer-size:="1m"`, "only for mode=non-blocking"),
			bad(`max-buffer-size:="1"`, "from 64k to 1g"), bad(`max-size:="10m"`, "unknown log opt", t+`LogDriver.Name="none"`)},
	}
	g := r + "Reservations.GenericResources[]."
	for _, l := range []string{"Kind", "Value"} {
		all[g+"NamedResourceSpec."+l] = []row{bad(`"gpu"`, "the node chooses which ones").named(r + "Reservations.GenericResources[0].NamedResourceSpec")}
	}
	all[g+"DiscreteResourceSpec.Kind"] = []row{kept(`"gpu"`), bad(`"a b"`, "without spaces"), bad(`""`, "want a name")}
	all[g+"DiscreteResourceSpec.Value"] = []row{kept("2"), bad("0", "want 1 to 2147483647"),
		bad("2147483648", "want 1 to 2147483647")}
	for _, l := range []string{"name", "remote"} {
		all[t+"PluginSpec."+l] = []row{bad(`"x"`, "plugin tasks: not supported").named(t + "PluginSpec")}
	}
	for l, v := range map[string]string{"disabled": "true", "env[]": `"x"`, "privileges[].name": `"x"`, "privileges[].description": `"x"`, "privileges[].value[]": `"x"`} {
		all[t+"PluginSpec."+l] = []row{bad(v, "plugin tasks: not supported").named(t + "PluginSpec")}
	}
	all[t+"NetworkAttachmentSpec.ContainerID"] = []row{bad(`"x"`, "network attachment tasks: not supported").named(t + "NetworkAttachmentSpec")}
	return all
}

func containerRows() map[string][]row {
	const c, p = "TaskTemplate.ContainerSpec.", "TaskTemplate.ContainerSpec.Privileges."
	all := map[string][]row{
		c + "Image":    {kept(`"nginx:1@sha256:0000000000000000000000000000000000000000000000000000000000000000"`), bad(`""`, "image reference must be provided"), bad(`"UPPER case"`, "not a valid repository/tag")},
		c + "Labels{}": labelRows(false),
		c + "Hostname": {kept(`"h-{{.Task.Slot}}"`), kept(`"a.b"`), bad(`"a b"`, "want at most 64"), bad(`"a\nb"`, "want at most 64"), bad(long, "want at most 64"), bad(`"{{.Nope}}"`, "invalid template"), bad(`"{{"`, "invalid template"),
			bad(`"{{range 9999999999}}{{end}}"`, "is not possible here"), bad(`"{{define \"x\"}}{{end}}{{template \"x\"}}"`, "is not possible here"), bad(`"{{$x := 1}}"`, "variables"), bad(`"{{printf \"%0999999d\" 1}}"`, "widths"), bad(`"{{js .Task.ID}}"`, "function js")},
		p + "CredentialSpec.Config":   {bad(`"x"`, "credential specs").named(p + "CredentialSpec")},
		p + "CredentialSpec.File":     {bad(`"x"`, "credential specs").named(p + "CredentialSpec")},
		p + "CredentialSpec.Registry": {bad(`"x"`, "credential specs").named(p + "CredentialSpec")},
		p + "SELinuxContext.Disable":  {kept("true")},
		p + "Seccomp.Mode":            {kept(`"default"`), kept(`"unconfined"`), bad(`"lax"`, "unknown seccomp mode")},
		p + "Seccomp.Profile":         {kept(`"e30="`, p+`Seccomp.Mode="custom"`), bad(`"eA=="`, "no JSON", p+`Seccomp.Mode="custom"`), bad(`"e30="`, "needs the mode")},
		p + "AppArmor.Mode":           {kept(`"disabled"`), bad(`"web"`, "unknown AppArmor mode")},
		p + "NoNewPrivileges":         {kept("true")},
		c + "Sysctls{}":               {kept(`net.core.somaxconn:="1"`), bad(`net/../kernel/core_pattern:="x"`, "malformed"), bad(`a b:="1"`, "malformed"), bad(`net.core.somaxconn:="1\n2"`, "want one line"), bad(`:="1"`, "malformed")},
		c + "CapabilityAdd[]":         {kept(`"CAP_NET_ADMIN"`), kept(`"ALL"`), kept(`"net_raw"`), bad(`"nope"`, `invalid CapabilityAdd: unknown capability: "nope"`), bad(`""`, "unknown capability")},
		c + "CapabilityDrop[]":        {kept(`"ALL"`), bad(`"CAP_X"`, `invalid CapabilityDrop: unknown capability: "CAP_X"`)},
		c + "Ulimits[].Name":          {kept(`"nproc"`), bad(`"nope"`, "invalid ulimit type"), bad(`""`, "is missing")},
		c + "Ulimits[].Soft":          {kept("0"), bad("2", "not above the hard limit (1)"), bad("-2", "want -1")},
		c + "Ulimits[].Hard":          {kept("-1"), bad("-2", "want 0 or more"), bad("0", "not above").named(c + "Ulimits[0].Soft")},
		c + "Secrets[].SecretID":      {bad(`""`, "malformed secret reference")},
		c + "Secrets[].SecretName":    {bad(`""`, "malformed secret reference")},
		c + "Secrets[].File":          {bad("null", "no target provided: s")},
		c + "Configs[].ConfigID":      {bad(`""`, "malformed config reference")},
		c + "Configs[].ConfigName":    {bad(`""`, "malformed config reference")},
		c + "Configs[].File":          {bad("null", "no target provided: s")},
		c + "Configs[].Runtime":       {bad("{}", "credential spec")},
		c + "Secrets":                 {bad(`[{"SecretID":"x","SecretName":"x","File":{"Name":"a"}},{"SecretID":"y","SecretName":"y","File":{"Name":"/run/secrets/./a"}}]`, "conflicting target").named(c + "Secrets[1].File.Name")},
	}
	for _, l := range []string{"User", "Role", "Type", "Level"} {
		all[p+"SELinuxContext."+l] = []row{bad(`"x"`, "SELinux contexts").named(p + "SELinuxContext")}
	}
	for _, kind := range []string{"Secrets[].File.", "Configs[].File."} {
		all[c+kind+"Name"] = []row{bad(`""`, "no target given"), bad(`".."`, "is not a file below"), bad(`"a\nb"`, "is not a file below")}
		all[c+kind+"UID"] = []row{bad(`"bob"`, "not a numeric id"), bad(`"4294967295"`, "want 0 to 4294967294"), bad(`"-1"`, "not a numeric id")}
		all[c+kind+"GID"] = []row{bad(`"bob"`, "not a numeric id")}
		all[c+kind+"Mode"] = []row{bad("512", "0 to 511"), bad("4294967295", "0 to 511")}
	}
	return all
}

func processRows() map[string][]row {
	const c, h = "TaskTemplate.ContainerSpec.", "TaskTemplate.ContainerSpec.Healthcheck."
	times := []row{kept("0"), kept("1000000"), bad("-1000000000", "= -1s: ContainerSpec:"), bad("999999", "cannot be less than 1ms")}
	test := func(v string) string { return h + "Test=" + v }
	return map[string][]row{
		c + "Command[]":               {kept(`"sh"`), kept(`""`)},
		c + "Args[]":                  {kept(`"-c"`), kept(`""`), kept(`"{{.X}}"`)},
		c + "Env[]":                   {kept(`"A=b=c"`), kept(`"A"`), kept(`"A={{.Node.Hostname}}"`), bad(`"=x"`, "invalid environment variable"), bad(`""`, "invalid environment variable"), bad(`"A={{.Task.Slots}}"`, "invalid template")},
		c + "Dir":                     {kept(`"/srv"`), bad(`"rel"`, "needs to be an absolute path")},
		c + "User":                    {kept(`"bob:users"`), kept(`"1000"`), bad(`"a b"`, "USER:GROUP"), bad(`"a:b:c"`, "USER:GROUP"), bad(`"a\n"`, "USER:GROUP")},
		c + "Groups[]":                {kept(`"audio"`), bad(`""`, "a group"), bad(`"a:b"`, "a group")},
		c + "Init":                    {kept("true"), kept("false")},
		c + "StopSignal":              {kept(`"SIGTERM"`), kept(`"quit"`), kept(`"9"`), kept(`"SIGRTMIN+3"`), bad(`"SIGNOPE"`, "invalid signal"), bad(`"65"`, "1 to 64"), bad(`"0"`, "1 to 64")},
		c + "TTY":                     {kept("true")},
		c + "OpenStdin":               {kept("true")},
		c + "ReadOnly":                {kept("true")},
		c + "StopGracePeriod":         {kept("0"), kept("60000000000"), bad("-1", "stop-grace-period cannot be negative")},
		c + "OomScoreAdj":             {kept("-1000"), bad("-1001", "want -1000 to 1000"), bad("1001", "want -1000 to 1000")},
		c + "Isolation":               {kept(`"default"`), bad(`"hyperv"`, "not supported"), bad(`"process"`, "not supported")},
		h + "Test[]":                  {kept(`"NONE"`), bad(`"sh"`, "want NONE, CMD or CMD-SHELL"), bad(`"CMD"`, "needs a command").named(c + "Healthcheck.Test")},
		h + "Test":                    {kept(`["CMD-SHELL","true"]`), kept(`["CMD","true"]`)},
		h + "Interval":                times,
		h + "Timeout":                 times,
		h + "StartPeriod":             times,
		h + "StartInterval":           append(times, kept("1000000", test(`["CMD","x"]`))),
		h + "Retries":                 {kept("3"), bad("-1", "cannot be negative")},
		c + "Hosts[]":                 {kept(`"10.0.0.1 a b"`), kept(`"::1 a"`), kept(`"host-gateway gw"`), bad(`"10.0.0.1"`, "invalid host"), bad(`"nope a"`, "is no IP address"), bad(`"10.0.0.1 a\n1.1.1.1 b"`, "invalid host"), bad(`""`, "invalid host")},
		c + "DNSConfig.Nameservers[]": {kept(`"1.1.1.1"`), kept(`"::1"`), bad(`"nope"`, "want an IP address"), bad(`""`, "is missing")},
		c + "DNSConfig.Search[]":      {kept(`"example.com"`), kept(`"."`), bad(`"a b"`, "without spaces"), bad(`""`, "without spaces")},
		c + "DNSConfig.Options[]":     {kept(`"ndots:2"`), bad(`"a\nb"`, "without spaces")},
	}
}

func mountRows() map[string][]row {
	const m = "TaskTemplate.ContainerSpec.Mounts[]."
	volume := []string{m + `Type="volume"`, m + `Source="vol"`}
	tmpfs := []string{m + `Type="tmpfs"`, m + `Source=""`}
	all := map[string][]row{
		m + "Type": {kept(`"bind"`), bad(`"floppy"`, "want bind, volume or tmpfs"), bad(`"cluster"`, "not supported"), bad(`"image"`, "not supported"), bad(`"npipe"`, "not supported"), bad(`""`, "want bind, volume or tmpfs")},
		m + "Source": {kept(`"/x"`), kept(`"vol"`, m+`Type="volume"`), kept(`""`, m+`Type="volume"`), kept(`"v-{{.Task.Slot}}"`, m+`Type="volume"`), bad(`""`, "source must not be empty"), bad(`"rel"`, "must be an absolute path"),
			bad(`"/abs"`, "must not be an absolute path", m+`Type="volume"`), bad(`"a b"`, "invalid volume name", m+`Type="volume"`), bad(`"x"`, "source must be empty", m+`Type="tmpfs"`), bad(`"/{{.X}}"`, "invalid template")},
		m + "Target":                               {kept(`"/data"`), bad(`"rel"`, "must be an absolute path"), bad(`"/"`, "below /"), bad(`"/x/.."`, "below /"), bad(`""`, "must be an absolute path")},
		m + "ReadOnly":                             {kept("true")},
		m + "Consistency":                          {kept(`"cached"`), bad(`"eventually"`, "want default, consistent")},
		m + "BindOptions.Propagation":              {kept(`"rslave"`), bad(`"sideways"`, "invalid propagation mode"), bad(`"rslave"`, "must not be specified", volume...).named("TaskTemplate.ContainerSpec.Mounts[0].BindOptions")},
		m + "BindOptions.NonRecursive":             {kept("true")},
		m + "BindOptions.CreateMountpoint":         {kept("true")},
		m + "BindOptions.ReadOnlyNonRecursive":     {kept("true", m+"ReadOnly=true"), bad("true", "needs ReadOnly")},
		m + "BindOptions.ReadOnlyForceRecursive":   {kept("true", m+"ReadOnly=true"), bad("true", "needs ReadOnly"), bad("true", "excludes", m+"ReadOnly=true", m+"BindOptions.NonRecursive=true"), bad("true", "needs the propagation", m+"ReadOnly=true", m+`BindOptions.Propagation="shared"`)},
		m + "VolumeOptions.NoCopy":                 {kept("true", volume...), bad("true", "must not be specified").named("TaskTemplate.ContainerSpec.Mounts[0].VolumeOptions")},
		m + "VolumeOptions.Subpath":                {kept(`"a/b"`, volume...), bad(`"../x"`, "relative path within", volume...), bad(`"/x"`, "relative path within", volume...), bad(`"a"`, "anonymous volume", m+`Type="volume"`, m+`Source=""`)},
		m + "VolumeOptions.DriverConfig.Name":      {kept(`"local"`, volume...), bad(`"nfs"`, "not supported", volume...)},
		m + "VolumeOptions.DriverConfig.Options{}": {bad(`"x"`, "not supported", volume...).named("TaskTemplate.ContainerSpec.Mounts[0].VolumeOptions.DriverConfig.Options")},
		m + "ImageOptions.Subpath":                 {bad(`"x"`, "must not be specified").named("TaskTemplate.ContainerSpec.Mounts[0].ImageOptions")},
		m + "ClusterOptions":                       {bad(`{}`, "must not be specified")},
		m + "TmpfsOptions.SizeBytes":               {kept("1048576", tmpfs...), bad("-1", "must not be negative", tmpfs...), bad("1", "must not be specified").named("TaskTemplate.ContainerSpec.Mounts[0].TmpfsOptions")},
		m + "TmpfsOptions.Mode":                    {kept("1023", tmpfs...), bad("4096", "want 0 to 4095", tmpfs...)},
		m + "TmpfsOptions.Options[][]":             {kept(`"noexec"`, tmpfs...), bad(`"bogus"`, "invalid tmpfs option", tmpfs...).named("TaskTemplate.ContainerSpec.Mounts[0].TmpfsOptions.Options[0]")},
		m + "TmpfsOptions.Options":                 {kept(`[["uid","5"]]`, tmpfs...), bad(`[[]]`, "want a flag", tmpfs...).named("TaskTemplate.ContainerSpec.Mounts[0].TmpfsOptions.Options[0]"), bad(`[["uid","x"]]`, "invalid tmpfs option", tmpfs...).named("TaskTemplate.ContainerSpec.Mounts[0].TmpfsOptions.Options[0]")},
		"TaskTemplate.ContainerSpec.Mounts":        {bad(`[{"Type":"volume","Source":"vol","Target":"/b"},{"Type":"tmpfs","Target":"/b/"}]`, "duplicate mount point").named("TaskTemplate.ContainerSpec.Mounts[1].Target")},
	}
	for _, r := range labelRows(false) {
		r.with = volume
		all[m+"VolumeOptions.Labels{}"] = append(all[m+"VolumeOptions.Labels{}"], r)
	}
	return all
}

func networkRows() map[string][]row {
	return map[string][]row{
		"Name":       {kept(`"a.b-c_d"`), bad(`""`, "1 to 63"), bad(`"a b"`, "invalid network name"), bad(`"a\nb"`, "invalid network name"), bad(long, "1 to 63"), bad(`"-a"`, "invalid network name")},
		"Driver":     {kept(`"overlay"`), kept(`""`), bad(`"bridge"`, "use overlay"), bad(`"macvlan"`, "use overlay")},
		"Scope":      {kept(`"swarm"`), bad(`"local"`, "use swarm")},
		"EnableIPv4": {kept("true"), bad("false", "networks without IPv4")},
		"EnableIPv6": {kept("false"), kept("true")},
		"Internal":   {kept("true")}, "Attachable": {kept("true")},
		"Ingress":    {bad("true", "cannot be attachable", "Attachable=true").named("Attachable"), bad("true", "cannot be internal", "Internal=true").named("Internal")},
		"ConfigOnly": {bad("true", "config-only networks")}, "ConfigFrom.Network": {bad(`"x"`, "config-only networks")},
		"IPAM.Driver":          {kept(`"default"`), bad(`"infoblox"`, "IPAM drivers")},
		"IPAM.Options{}":       {bad(`"x"`, "IPAM options").named("IPAM.Options")},
		"IPAM.Config[].Subnet": {kept(`"10.5.0.0/16"`), kept(`""`), bad(`"10.5.0.0"`, "want a subnet such as"), bad(`"10.5.0.0/33"`, "want a subnet"), kept(`"fd00::/64"`), bad(`"x"`, "want a subnet")},
		"IPAM.Config": {kept(`[{"Subnet":"10.5.0.0/16"},{"Subnet":"10.6.0.0/16"},{"Subnet":"fd00::/64"}]`),
			kept(`[{"Subnet":"10.5.0.0/16","IPRange":"10.5.1.0/24","Gateway":"10.5.0.9","AuxiliaryAddresses":{"a":"10.5.1.7"}}]`),
			bad(`[{"Subnet":"fd00::/64"},{"Subnet":"fd01::/64"}]`, "2 IPv6 subnets"),
			bad(`[{"Subnet":"10.5.0.0/16","IPRange":"10.4.0.0/14"}]`, "not within subnet 10.5.0.0/16").named("IPAM.Config[0].IPRange"),
			bad(`[{"Subnet":"10.5.0.0/16","Gateway":"10.6.0.1"}]`, "not in subnet 10.5.0.0/16").named("IPAM.Config[0].Gateway"),
			bad(`[{"Subnet":"10.5.0.0/16","AuxiliaryAddresses":{"a":"10.6.0.1"}}]`, "not in subnet 10.5.0.0/16").named("IPAM.Config[0].AuxiliaryAddresses[a]")},
		"IPAM.Config[].IPRange":              {bad(`"10.5.1.0/24"`, "need the subnet").named("IPAM.Config[0].Subnet")},
		"IPAM.Config[].Gateway":              {bad(`"10.5.1.1"`, "need the subnet").named("IPAM.Config[0].Subnet"), bad(`"x"`, "want an IP address")},
		"IPAM.Config[].AuxiliaryAddresses{}": {bad(`"10.5.1.1"`, "need the subnet").named("IPAM.Config[0].Subnet")},
		"Options{}": {kept(`com.docker.network.driver.mtu:="1400"`), bad(`com.docker.network.driver.mtu:="1"`, "want 576 to 65535"), bad(`com.docker.network.driver.overlay.vxlanid_list:="0"`, "1 to 16777215"),
			bad(`com.docker.network.driver.overlay.vxlanid_list:="16777216"`, "1 to 16777215"), kept(`encrypted:=""`), kept(`encrypted:="true"`), kept(`encrypted:="false"`), bad(`encrypted:="maybe"`, "true or false"), bad(`colour:="x"`, "not supported")},
		"Labels{}": labelRows(true),
	}
}

func secretRows() map[string][]row {
	return map[string][]row{
		"Name":     {kept(`"a.b-c_d"`), bad(`""`, "invalid secret name"), bad(`"-x"`, "invalid secret name"), bad(`"a b"`, "invalid secret name"), bad(`"a\nb"`, "invalid secret name"), bad(long, "1 to 64")},
		"Labels{}": labelRows(true), "Data": {kept(`"eA=="`), bad(`""`, "larger than 0 and less than"), bad(`"x"`, "not base64")},
		"Driver.Name": {bad(`"vault"`, "not supported")}, "Driver.Options{}": {bad(`"x"`, "no driver").named("Driver.Options")},
		"Templating.Name": {kept(`"golang"`), bad(`"jinja"`, "want golang")}, "Templating.Options{}": {bad(`"x"`, "no options").named("Templating.Options")},
	}
}

func configRows() map[string][]row {
	rows := secretRows()
	delete(rows, "Driver.Name")
	delete(rows, "Driver.Options{}")
	rows["Name"] = []row{kept(`"a.b"`), bad(`""`, "invalid config name"), bad(`"a/b"`, "invalid config name"), bad(long, "1 to 64")}
	return rows
}

func nodeRows() map[string][]row {
	return map[string][]row{
		"Name":         {kept(`"db-1"`), bad(`"a b"`, "want at most 63"), bad(long, "want at most 63"), bad(`"a\nb"`, "want at most 63")},
		"Labels{}":     labelRows(true),
		"Role":         {kept(`"worker"`), bad(`"boss"`, "want manager or worker")},
		"Availability": {kept(`"drain"`), kept(`"pause"`), kept(`"active"`), bad(`"sleepy"`, "want active, pause or drain"), bad(`""`, "is missing")},
	}
}

func clusterRows() map[string][]row {
	all := map[string][]row{
		"Name":     {kept(`"default"`), bad(`"other"`, "the only allowed name")},
		"Labels{}": labelRows(true),
		"Orchestration.TaskHistoryRetentionLimit": {kept("0"), kept("-1"), kept("1000"), bad("1001", "at most 1000")},
		"Dispatcher.HeartbeatPeriod":              {kept("5000000000"), bad("-1", "= -1ns: must be more than 0"), bad("1000000000", "= 1s: another heartbeat period")},
		"CAConfig.NodeCertExpiry":                 {kept("3600000000000"), bad("3599000000000", "must be at least 1h0m0s"), bad("-1", "must be at least")},
		"CAConfig.SigningCACert":                  {bad(`"x"`, "not exactly one PEM certificate")},
		"CAConfig.SigningCAKey":                   {bad(`"x"`, "the signing CA cert must also be provided")},
		"CAConfig.ForceRotate":                    {kept("1")},
		"TaskDefaults.LogDriver.Name":             {bad(`"local"`, "default log driver").named("TaskDefaults.LogDriver")},
		"TaskDefaults.LogDriver.Options{}":        {bad(`"x"`, "default log driver").named("TaskDefaults.LogDriver")},
		"EncryptionConfig.AutoLockManagers":       {kept("true"), kept("false")},
	}
	for _, l := range []string{"SnapshotInterval", "KeepOldSnapshots", "LogEntriesForSlowFollowers", "ElectionTick", "HeartbeatTick"} {
		all["Raft."+l] = []row{bad("7", "other Raft settings")}
	}
	all["Raft.SnapshotInterval"] = append(all["Raft.SnapshotInterval"], kept("10000"))
	for _, l := range []string{"Protocol", "URL", "CACert", "Options{}"} {
		why := "want https://" // the first thing that is wrong
		if l == "Protocol" {
			why = "the only protocol is cfssl"
		}
		all["CAConfig.ExternalCAs[]."+l] = []row{bad(`"x"`, why).named("CAConfig.ExternalCAs")}
	}
	return all
}
