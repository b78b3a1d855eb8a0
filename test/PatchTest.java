import static org.assertj.core.api.Assertions.assertThat;
import static org.junit.jupiter.params.provider.Arguments.arguments;

import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.node.ObjectNode;
import io.fabric8.kubernetes.api.model.ConfigMap;
import io.fabric8.kubernetes.api.model.Container;
import io.fabric8.kubernetes.api.model.Lifecycle;
import io.fabric8.kubernetes.api.model.PodSpec;
import io.fabric8.kubernetes.api.model.Probe;
import io.fabric8.kubernetes.api.model.Volume;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.nio.file.attribute.PosixFilePermissions;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.Objects;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import java.util.stream.Collectors;
import java.util.stream.Stream;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.Arguments;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.MethodSource;
import org.junit.jupiter.params.provider.ValueSource;

/** Merges the README's patches into manifests as people have them, and runs the commands of its Dockerfile and text. */
class PatchTest {

    /** BuildKit's example of a Deployment with TLS. */
    private static final String PRIVILEGED = """
            apiVersion: apps/v1
            kind: Deployment
            metadata: {name: buildkitd}
            spec:
              selector: {matchLabels: {app: buildkitd}}
              template:
                metadata: {labels: {app: buildkitd}, annotations: {team: ci}}
                spec:
                  containers:
                    - name: buildkitd
                      image: moby/buildkit:master
                      args: [--addr, "unix:///run/buildkit/buildkitd.sock", --addr, "tcp://0.0.0.0:1234",
                        --tlscacert, /certs/ca.pem, --tlscert, /certs/cert.pem, --tlskey, /certs/key.pem]
                      env: [{name: TZ, value: UTC}]
                      ports: [{containerPort: 1234}]
                      readinessProbe: {exec: {command: [buildctl, debug, workers]}, periodSeconds: 30}
                      livenessProbe: {exec: {command: [buildctl, debug, workers]}, terminationGracePeriodSeconds: 300}
                      securityContext: {privileged: true}
                      volumeMounts: [{name: certs, mountPath: /certs, readOnly: true}]
                  volumes: [{name: certs, secret: {secretName: buildkit-daemon-certs}}]
            """;
    /** The same, with the unix socket only. */
    private static final String STATEFUL_SET = """
            apiVersion: apps/v1
            kind: StatefulSet
            metadata: {name: buildkitd}
            spec:
              serviceName: buildkitd
              podManagementPolicy: Parallel
              selector: {matchLabels: {app: buildkitd}}
              template:
                metadata: {labels: {app: buildkitd}}
                spec:
                  containers:
                    - {name: buildkitd, image: "moby/buildkit:master", securityContext: {privileged: true}}
            """;
    /** What buildx's kubernetes driver makes. */
    private static final String DRIVER = """
            apiVersion: apps/v1
            kind: Deployment
            metadata: {name: builder0, annotations: {buildx.docker.com/platform: linux/amd64}}
            spec:
              selector: {matchLabels: {app: builder0}}
              template:
                metadata: {labels: {app: builder0}, annotations: {buildx.docker.com/platform: linux/amd64}}
                spec:
                  initContainers:
                    - {name: qemu, image: tonistiigi/binfmt, securityContext: {privileged: true}}
                  containers:
                    - name: buildkitd
                      image: moby/buildkit:buildx-stable-1
                      readinessProbe: {exec: {command: [buildctl, debug, workers]}}
                      securityContext: {privileged: true}
                      volumeMounts: [{name: config, mountPath: /etc/buildkit}]
                  volumes: [{name: config, configMap: {name: builder0-config}}]
            """;
    private static final String OF_ANOTHER_NAME = PRIVILEGED.replace("- name: buildkitd", "- name: builder");

    private static Stream<Arguments> manifests() {
        return Stream.of(
                arguments("privileged with TLS", PRIVILEGED),
                arguments("rootless", PRIVILEGED.replace("{privileged: true}",
                        "{runAsUser: 1000, runAsGroup: 1000, seccompProfile: {type: Unconfined}}")),
                arguments("StatefulSet", STATEFUL_SET),
                arguments("kubernetes driver", DRIVER),
                arguments("container of another name", OF_ANOTHER_NAME),
                arguments("gRPC probe", PRIVILEGED.replaceFirst("exec: \\{command: [^]]*]}", "grpc: {port: 1234}")),
                arguments("preStop.sleep", PRIVILEGED.replace("args:", "lifecycle: {preStop: {sleep: {seconds: 5}}}\n"
                        + "          args:")),
                arguments("init containers", PRIVILEGED.replace("      containers:", "      initContainers:\n"
                        + "        - {name: first, image: busybox}\n        - {name: second, image: busybox}\n"
                        + "      containers:")));
    }

    @TempDir
    Path temp;

    private final List<Hook> started = new ArrayList<>();

    // ---- The patches, merged ---------------------------------------------------------------------------------------

    @ParameterizedTest(name = "{0}")
    @MethodSource("manifests")
    void eachPatchMergesWithKubectlAndWithKustomize(String name, String manifest) throws IOException {
        JsonNode target = DocsTest.YAML.readTree(manifest);
        String kind = target.path("kind").asText();
        String of = target.at("/metadata/name").asText();
        String kustomization = DocsTest.blocks("yaml").stream().map(DocsTest.Block::text)
                .filter(text -> text.startsWith("resources:")).findFirst().orElseThrow()
                .replace("{kind: Deployment, name: buildkitd}", "{kind: " + kind + ", name: " + of + "}");
        Files.copy(Hook.SCRIPT, temp.resolve(Hook.SCRIPT.getFileName()));
        Files.writeString(temp.resolve("buildkitd.yaml"), manifest);
        for (String file : List.of("prestop.yaml", "baked.yaml")) {
            String patch = DocsTest.saved(file).replaceFirst("^kind: Deployment", "kind: " + kind)
                    .replaceFirst("metadata: \\{name: buildkitd}", "metadata: {name: " + of + "}")
                    .replaceFirst("- name: buildkitd", "- name: "
                            + target.at("/spec/template/spec/containers/0/name").asText());
            assertMerged(patched(manifest, patch, "-o", "yaml"), manifest, patch);

            Files.writeString(temp.resolve(file), patch);
            Files.writeString(temp.resolve("kustomization.yaml"), kustomization.replace("prestop.yaml", file));
            String[] made = kubectl("kustomize", temp.toString()).split("(?m)^---$");
            ConfigMap map = DocsTest.YAML.readValue(made[0], ConfigMap.class);
            assertThat(map.getData()).containsValue(DocsTest.read(Hook.SCRIPT));
            String hashed = map.getMetadata().getName(); // another script, another name: the pods are renewed
            assertThat(made[1].contains("name: " + hashed)).isEqualTo(file.equals("prestop.yaml"));
            assertMerged(made[1].replace(hashed, "buildkit-prestop"), manifest, patch);
        }
    }

    @Test
    void readmesCommandShowsGracePeriodAndHookAndAContainerTooMany() throws IOException {
        String check = DocsTest.blocks("sh").stream().map(DocsTest.Block::text)
                .filter(text -> text.contains("jsonpath=")).findFirst().orElseThrow();
        String template = check.substring(check.indexOf("jsonpath='"), check.lastIndexOf("'")).replace("'", "");
        String patch = DocsTest.saved("baked.yaml");
        assertThat(shown(PRIVILEGED, patch, template)).isEqualTo(
                "3600 buildkitd {\"exec\":{\"command\":[\"buildkit-prestop\"]}}");
        assertThat(shown(PRIVILEGED, DocsTest.saved("prestop.yaml"), template)).startsWith("3600 prestop buildkitd {");
        assertThat(shown(OF_ANOTHER_NAME, patch, template)).startsWith("3600 buildkitd builder {");
        assertThat(shown(PRIVILEGED, "spec: {replicas: 1}", template)).isEqualTo("buildkitd");
        assertThat(patched(OF_ANOTHER_NAME, DocsTest.saved("prestop.yaml"), "-o", "jsonpath={..containers[*].image}"))
                .as("the API refuses a container without an image").isEqualTo("moby/buildkit:master\n");
    }

    private String shown(String manifest, String patch, String template) throws IOException {
        return patched(manifest, patch, "-o", template).strip().replaceAll("\\s+", " ");
    }

    /** The patch is in it, and so is all of the manifest that the patch does not speak of, probes above all. */
    private static void assertMerged(String result, String manifest, String patch) throws IOException {
        JsonNode merged = DocsTest.YAML.readTree(result);
        ObjectNode target = (ObjectNode) DocsTest.YAML.readTree(manifest);
        ObjectNode container = (ObjectNode) target.at("/spec/template/spec/containers/0");
        container.remove("lifecycle");
        if (patch.contains(" image: registry.example.com/")) {
            container.remove("image");
        }
        assertThat(holds(merged, target)).as("%s%nis not whole in %s", target, merged).isTrue();
        assertThat(holds(merged, DocsTest.YAML.readTree(patch))).as("%s%nis not whole in %s", patch, merged).isTrue();

        PodSpec before = DocsTest.podOf(manifest);
        PodSpec pod = DocsTest.podOf(result);
        assertThat(pod.getContainers()).hasSize(1);
        Container buildkitd = pod.getContainers().get(0);
        assertThat(probes(buildkitd)).isEqualTo(probes(before.getContainers().get(0)));
        Lifecycle lifecycle = buildkitd.getLifecycle();
        assertThat(lifecycle.getPreStop().getExec().getCommand()).isNotEmpty();
        assertThat(lifecycle.getPreStop().getSleep()).as("a second handler").isNull();
        List<String> init = pod.getInitContainers().stream().map(Container::getName).toList();
        List<String> own = before.getInitContainers().stream().map(Container::getName).toList();
        assertThat(init).isEqualTo(patch.contains("initContainers:")
                ? Stream.concat(Stream.of("prestop"), own.stream()).toList() : own);
        Map<String, Volume> volumes = pod.getVolumes().stream().collect(Collectors.toMap(Volume::getName, v -> v));
        for (Container each : Stream.of(pod.getInitContainers(), pod.getContainers()).flatMap(List::stream).toList()) {
            assertThat(each.getVolumeMounts()).allMatch(mount -> volumes.containsKey(mount.getName()));
        }
    }

    private static List<Probe> probes(Container container) {
        return Stream.of(container.getReadinessProbe(), container.getLivenessProbe(), container.getStartupProbe())
                .filter(Objects::nonNull).toList();
    }

    /** Whether the whole has all that the part has; in lists of objects in any place; null stands for nothing. */
    private static boolean holds(JsonNode whole, JsonNode part) {
        if (part.isObject()) {
            return part.properties().stream().allMatch(field -> holds(whole.path(field.getKey()), field.getValue()));
        }
        if (part.path(0).isObject()) {
            return part.valueStream().allMatch(item -> whole.valueStream().anyMatch(other -> holds(other, item)));
        }
        return part.isNull() ? whole.isMissingNode() || whole.isNull() : whole.equals(part);
    }

    private String patched(String manifest, String patch, String... output) throws IOException {
        Files.writeString(temp.resolve("manifest.yaml"), manifest);
        Files.writeString(temp.resolve("patch.yaml"), patch);
        return kubectl(Stream.concat(Stream.of("patch", "--local", "-f", temp.resolve("manifest.yaml").toString(),
                "--patch-file", temp.resolve("patch.yaml").toString()), Stream.of(output)).toArray(String[]::new));
    }

    private String kubectl(String... arguments) {
        List<String> command = new ArrayList<>(List.of(Tools.require("kubectl").toString()));
        command.addAll(List.of(arguments));
        try (Hook kubectl = Hook.run(command, Map.of("HOME", temp.toString()))) {
            assertThat(kubectl.exitCode()).as(String.join("\n", kubectl.err())).isZero();
            return String.join("\n", kubectl.out()) + "\n";
        }
    }

    // ---- The command buildkit-prestop of the Dockerfile, run -------------------------------------------------------

    /** What the command calls: it notes its arguments and Java's options, and ends as the file "code" says. */
    @BeforeEach
    void makeStubs() throws IOException {
        Files.createDirectories(temp.resolve("bin"));
        exitWith(0);
        for (String stub : List.of("java", "jbang")) {
            Tools.stub(temp.resolve("bin").resolve(stub), """
                    echo "%2$s $*$JAVA_TOOL_OPTIONS$JDK_JAVA_OPTIONS$_JAVA_OPTIONS" >>%1$s/calls
                    echo "said by %2$s" >&2
                    read code <%1$s/code
                    exit $code
                    """.formatted(temp, stub));
        }
        Tools.stub(temp.resolve("bin/sleep"), "exec /bin/sleep 0.1");
    }

    @AfterEach
    void endAll() {
        started.forEach(Hook::close);
    }

    @ParameterizedTest
    @ValueSource(strings = {"dash", "busybox ash"})
    void hookThatCrashesIsStartedAgainUntilAllIsQuiet(String shell) throws IOException {
        exitWith(1);
        Hook wait = start(shell, command());
        Hook.waitUntil("the hook is started again", () -> calls().size() >= 3);
        assertThat(wait.process().isAlive()).isTrue();
        exitWith(0);
        assertThat(wait.exitCode()).isZero();
        assertThat(calls()).containsOnly("java -jar /opt/prestop/hook.jar");
        assertThat(wait.err()).as("what the hook says is seen").containsOnly("said by java");
    }

    @ParameterizedTest
    @ValueSource(strings = {"dash", "busybox ash"})
    void hookThatGaveUpIsNotStartedAgain(String shell) throws IOException {
        exitWith(124);
        assertThat(start(shell, command()).exitCode()).isEqualTo(124);
        assertThat(calls()).hasSize(1);
    }

    @ParameterizedTest
    @CsvSource({"dash, 0", "dash, 1", "dash, 2", "busybox ash, 0", "busybox ash, 1", "busybox ash, 2"})
    void hookWithArgumentsIsRunOnceHoweverItEnds(String shell, int code) throws IOException {
        exitWith(code);
        assertThat(start(shell, command(), "--once", "--log-prefix=a b").exitCode()).isEqualTo(code);
        assertThat(calls()).containsExactly("java -jar /opt/prestop/hook.jar --once --log-prefix=a b");
    }

    @ParameterizedTest
    @ValueSource(strings = {"dash", "busybox ash"})
    void waitGoesOnWhileTheHookCannotBeStarted(String shell) throws IOException {
        Path java = temp.resolve("bin/java");
        Files.move(java, temp.resolve("bin/gone"));
        Hook wait = start(shell, command());
        Hook.pause(1000);
        assertThat(wait.process().isAlive()).isTrue();
        Files.move(temp.resolve("bin/gone"), java);
        assertThat(wait.exitCode()).isZero();
    }

    @ParameterizedTest
    @ValueSource(strings = {"dash", "busybox ash"})
    void waitGoesOnWhileNoProcessCanBeStarted(String shell) throws IOException {
        Tools.requireRoot();
        Tools.require("prlimit");
        Files.setPosixFilePermissions(temp, PosixFilePermissions.fromString("rwxrwxrwx"));
        exitWith(1);
        Hook wait = start("setpriv --reuid=64321 --clear-groups " + shell, command()); // root would have no limit
        Hook.waitUntil("it waits", () -> !calls().isEmpty());
        limitProcesses(wait, 0);
        Hook.pause(1000);
        limitProcesses(wait, 1000);
        assertThat(wait.process().isAlive()).isTrue();
        assertThat(wait.err()).as("no thousands of complaints").containsOnly("said by java");
        Path open = Path.of("/proc", String.valueOf(wait.process().pid()), "fd");
        assertThat(open.toFile().list()).as("no pipe is left of each try").hasSizeLessThan(20);
        exitWith(0);
        assertThat(wait.exitCode()).isZero();
    }

    @Test
    void imageWithJBangRunsTheScriptUnderTheSameName() throws IOException {
        Matcher edit = Pattern.compile("sed -i \\\\\n *'(.*)' \\\\\n *(\\S+)").matcher(dockerfiles().get(1));
        assertThat(edit.find()).isTrue();
        Path command = Files.writeString(temp.resolve("edited"), commandText());
        assertThat(dockerfiles().get(0)).contains("<<'EOF' " + edit.group(2) + "\n");
        assertThat(Hook.run(List.of("sed", "-i", edit.group(1), command.toString()), Map.of()).exitCode()).isZero();
        assertThat(start("dash", moved(Files.readString(command)), "--once").exitCode()).isZero();
        assertThat(calls()).containsExactly("jbang --offline /opt/prestop/buildkit-prestop.java --once");
    }

    private static void limitProcesses(Hook hook, int count) {
        Hook prlimit = Hook.run(List.of("setpriv", "--reuid=64321", "--clear-groups", "prlimit",
                "--pid=" + hook.process().pid(), "--nproc=" + count + ":"), Map.of());
        assertThat(prlimit.exitCode()).as(prlimit.err().toString()).isZero();
    }

    // ---- See it work -----------------------------------------------------------------------------------------------

    @ParameterizedTest
    @CsvSource({"'', false", "0, false", "2, true"})
    void seeItWorkDeletesThePodOnlyWhenABuildRunsInIt(String builds, boolean deletes) throws IOException {
        Tools.stub(temp.resolve("bin/kubectl"), """
                echo "kubectl $*" >>%1$s/calls
                case "$*" in
                    "get pod"*) echo pod/first && echo pod/second ;;
                    *--once) echo "%2$s" ;;
                esac
                """.formatted(temp, builds));
        String block = DocsTest.blocks("sh").stream().map(DocsTest.Block::text)
                .filter(text -> text.contains("kubectl delete")).findFirst().orElseThrow();
        Hook shell = start("dash", Files.writeString(temp.resolve("block"), block));
        assertThat(shell.exitCode() == 0).isEqualTo(deletes);
        assertThat(shell.out().contains("The build ended well.")).isEqualTo(deletes);
        assertThat(calls().stream().filter(call -> call.contains(" delete "))).hasSize(deletes ? 1 : 0)
                .allMatch(call -> call.equals("kubectl delete pod/first --wait=false"));
    }

    // ---- Running ---------------------------------------------------------------------------------------------------

    private static List<String> dockerfiles() {
        return DocsTest.blocks("dockerfile").stream().map(DocsTest.Block::text).toList();
    }

    private static String commandText() {
        Matcher here = Pattern.compile("(?s)<<'EOF' /usr/local/bin/buildkit-prestop\n(.*?\n)EOF\n")
                .matcher(dockerfiles().get(0));
        assertThat(here.find()).isTrue();
        return here.group(1);
    }

    private Path command() throws IOException {
        return moved(commandText());
    }

    /** A file with the command, which calls the stubs. */
    private Path moved(String command) throws IOException {
        return Files.writeString(temp.resolve("command"),
                command.replaceAll("/opt/(prestop|jbang)/bin/", temp + "/bin/"));
    }

    private Hook start(String shell, Path script, String... arguments) {
        List<String> command = new ArrayList<>(List.of(shell.split(" ")));
        command.stream().filter(word -> !word.startsWith("--") && !word.equals("ash")).forEach(Tools::require);
        command.add(script.toString());
        command.addAll(List.of(arguments));
        Hook hook = Hook.run(command, Hook.env("PATH", temp.resolve("bin") + ":" + System.getenv("PATH"),
                "JAVA_TOOL_OPTIONS", "-Xbogus", "JDK_JAVA_OPTIONS", "-Xbogus", "_JAVA_OPTIONS", "-Xbogus"));
        started.add(hook);
        return hook;
    }

    /** Lets the hook end with this exit code from now on. */
    private void exitWith(int code) throws IOException {
        Path file = Files.writeString(temp.resolve("code.new"), code + "\n");
        Files.move(file, temp.resolve("code"), StandardCopyOption.REPLACE_EXISTING);
    }

    /** The calls of the stubs so far. */
    private List<String> calls() {
        Path calls = temp.resolve("calls");
        return Files.notExists(calls) ? List.of() : DocsTest.read(calls).lines().toList();
    }
}
