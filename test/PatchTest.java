import static org.assertj.core.api.Assertions.assertThat;
import static org.junit.jupiter.api.Assertions.assertDoesNotThrow;
import static org.junit.jupiter.api.Named.named;

import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.node.*;
import io.fabric8.kubernetes.api.model.*;
import java.io.IOException;
import java.nio.file.*;
import java.util.*;
import java.util.stream.Stream;
import org.junit.jupiter.api.*;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.*;

/** Merges the README's patches into manifests as people have them, and runs the commands of its image and its text. */
class PatchTest {

    /** BuildKit's example of a Deployment with TLS, shortened. */
    private static final String DEPLOYMENT = """
            apiVersion: apps/v1
            kind: Deployment
            metadata:
              name: buildkitd
            spec:
              selector: {matchLabels: {app: buildkitd}}
              template:
                metadata: {labels: {app: buildkitd}, annotations: {team: ci}}
                spec:
                  containers:
                    - name: buildkitd
                      image: moby/buildkit:master
                      args: [--addr, "tcp://0.0.0.0:1234", --tlscert, /certs/cert.pem, --tlskey, /certs/key.pem]
                      env: [{name: TZ, value: UTC}]
                      readinessProbe: {exec: {command: [buildctl, debug, workers]}, periodSeconds: 30}
                      livenessProbe: {exec: {command: [buildctl, debug, workers]}, terminationGracePeriodSeconds: 300}
                      securityContext: {privileged: true}
                      volumeMounts: [{name: certs, mountPath: /certs, readOnly: true}]
                  volumes: [{name: certs, secret: {secretName: buildkit-daemon-certs}}]
            """;
    /** One that has no list which a patch adds to. */
    private static final String STATEFUL_SET = """
            apiVersion: apps/v1
            kind: StatefulSet
            metadata:
              name: buildkitd
            spec:
              podManagementPolicy: Parallel
              template: {spec: {containers: [{name: buildkitd, image: "moby/buildkit:master"}]}}
            """;
    /** What else such a file may hold. */
    private static final String MORE = """
            ---
            apiVersion: v1
            kind: Service
            metadata: {name: buildkitd}
            spec: {ports: [{port: 1234}], selector: {app: buildkitd}}
            ---
            apiVersion: apps/v1
            kind: Deployment
            metadata: {name: registry, namespace: images}
            spec: {template: {spec: {containers: [{name: registry, image: "registry:3"}]}}}
            """;

    private static final String GRACE = "terminationGracePeriodSeconds";

    @TempDir
    Path temp;

    // ---- The patches, merged ---------------------------------------------------------------------------------------

    /** What a way of the README adds, the patches that do so, and their kustomization. */
    private record Way(ObjectNode patch, List<ObjectNode> files, ObjectNode kustomization) {
        static Stream<Named<Way>> all() {
            ObjectNode script = tree(DocsTest.saved("prestop.yaml"));
            ObjectNode baked = tree(DocsTest.saved("baked.yaml"));
            return Stream.of(
                    named("script in a sidecar",
                            new Way(script, List.of(script), tree(DocsTest.block("yaml", "configMapGenerator")))),
                    named("image in a sidecar", image()),
                    named("image in buildkitd's container",
                            new Way(baked, List.of(baked), tree(DocsTest.block("yaml", "images: [{")))));
        }

        /** Its two patches make of the script's sidecar the one of the Helm values. */
        static Way image() {
            ObjectNode script = tree(DocsTest.saved("prestop.yaml"));
            ObjectNode whole = script.deepCopy();
            pod(whole).set("initContainers", helmValues().get("initContainers"));
            ((ArrayNode) pod(whole).get("volumes")).remove(1);
            return new Way(whole, List.of(script, tree(DocsTest.saved("image.yaml"))),
                    tree(DocsTest.block("yaml", "{path: image.yaml}")));
        }

        /** Changes the words that the README names. */
        Way fittedTo(JsonNode manifest) {
            ObjectNode changed = kustomization.deepCopy();
            if (manifest.at("/metadata").has("namespace")) {
                changed.path("configMapGenerator").forEach(
                        map -> ((ObjectNode) map).set("namespace", manifest.at("/metadata/namespace")));
            }
            return new Way(fitted(patch, manifest), files.stream().map(file -> fitted(file, manifest)).toList(),
                    changed);
        }

        private static ObjectNode fitted(ObjectNode patch, JsonNode manifest) {
            ObjectNode copy = patch.deepCopy();
            copy.set("kind", manifest.get("kind"));
            ObjectNode metadata = (ObjectNode) copy.get("metadata");
            metadata.set("name", manifest.at("/metadata/name"));
            if (manifest.at("/metadata").has("namespace")) {
                metadata.set("namespace", manifest.at("/metadata/namespace"));
            }
            if (pod(copy).has("containers")) {
                buildkitd(copy).set("name", buildkitd(manifest).get("name"));
            }
            return copy;
        }
    }

    private static Stream<Named<String>> manifests() {
        String ofOtherNames = DEPLOYMENT.replace("name: buildkitd", "name: builder0");
        return Stream.of(named("a Deployment", DEPLOYMENT), named("in a namespace", inNamespace(DEPLOYMENT)),
                named("of other names", ofOtherNames),
                named("in a namespace, of other names", inNamespace(ofOtherNames)),
                named("a StatefulSet", STATEFUL_SET), named("in a namespace, a StatefulSet", inNamespace(STATEFUL_SET)),
                named("a container of another name", DEPLOYMENT.replace("- name: buildkitd", "- name: builder")),
                named("beside others", DEPLOYMENT + MORE), named("in a namespace, beside others",
                        inNamespace(DEPLOYMENT) + MORE),
                named("behind another container", DEPLOYMENT.replace("containers:", "containers:\n"
                        + "        - {name: proxy, image: envoy, lifecycle: {preStop: {sleep: {seconds: 5}}}}")),
                named("with init containers", DEPLOYMENT.replace("      containers:",
                        "      initContainers: [{name: qemu, image: tonistiigi/binfmt}]\n      containers:")),
                named("with grace and an exec hook", withHook("exec: {command: [sleep, '60']}")
                        .replace("      containers:", "      terminationGracePeriodSeconds: 60\n      containers:")),
                named("with a sleep hook", withHook("sleep: {seconds: 5}")),
                named("with an httpGet hook", withHook("httpGet: {port: 80}")));
    }

    private static String inNamespace(String manifest) {
        return manifest.replaceFirst("(metadata:\n.*\n)", "$1  namespace: ci\n");
    }

    private static String withHook(String handler) {
        return DEPLOYMENT.replace("- name: buildkitd",
                "- name: buildkitd\n          lifecycle: {preStop: {" + handler + "}}");
    }

    /** Those that differ most. */
    private static Stream<Named<String>> someManifests() {
        return manifests().filter(manifest -> List.of("a Deployment", "in a namespace, a StatefulSet",
                "a container of another name", "in a namespace, beside others", "with a sleep hook")
                .contains(manifest.getName()));
    }

    /** The first way for every manifest, the others for some. */
    static Stream<Arguments> waysAndManifests() {
        Named<Way> script = Way.all().findFirst().orElseThrow();
        return Stream.concat(manifests().map(manifest -> Arguments.of(script, manifest)), Way.all().skip(1).flatMap(
                way -> someManifests().map(manifest -> Arguments.of(way, manifest))));
    }

    @ParameterizedTest
    @MethodSource("waysAndManifests")
    void wordForWordItIsRightOrRefused(Way way, String manifest) throws IOException {
        JsonNode target = trees(manifest).get(0);
        Hook made = kustomize(manifest, way);
        if (target.at("/kind").asText().equals("Deployment") && target.at("/metadata").size() == 1
                && target.at("/metadata/name").asText().equals("buildkitd")) {
            assertThat(made.exitCode()).as(made.err().toString()).isZero();
            List<JsonNode> objects = trees(String.join("\n", made.out()));
            if (buildkitd(target).at("/name").asText().equals("buildkitd")) {
                assertRight(objects, trees(manifest), way);
            } else {
                assertThat(objects).as("the API refuses a container without an image").anyMatch(object ->
                        object.at("/spec/template/spec/containers").valueStream().anyMatch(each -> !each.has("image")));
            }
        } else {
            assertThat(made.exitCode()).isNotZero();
            assertThat(made.err().toString()).contains("no matches for Id Deployment");
        }
    }

    @ParameterizedTest
    @MethodSource("waysAndManifests")
    void withTheWordsChangedItIsRight(Way way, String manifest) throws IOException {
        Way fitted = way.fittedTo(trees(manifest).get(0));
        Hook made = kustomize(manifest, fitted);
        assertThat(made.exitCode()).as(made.err().toString()).isZero();
        assertRight(trees(String.join("\n", made.out())), trees(manifest), fitted);
    }

    @ParameterizedTest
    @MethodSource("someManifests")
    void imagesPatchIsRefusedWhereOnlyTheOtherOneWasFitted(String manifest) throws IOException {
        Way image = Way.image();
        JsonNode target = trees(manifest).get(0);
        Way fitted = image.fittedTo(target);
        boolean same = fitted.files.get(1).equals(image.files.get(1));
        Hook made = kustomize(manifest, new Way(fitted.patch, List.of(fitted.files.get(0), image.files.get(1)),
                fitted.kustomization));
        assertThat(made.exitCode() == 0).as(made.err().toString()).isEqualTo(same);
        assertThat(made.err().toString().contains("no matches for Id")).isEqualTo(!same);
    }

    @ParameterizedTest
    @MethodSource("someManifests")
    void kubectlPatchesTheSame(String manifest) throws IOException {
        String only = manifest.split("---\n")[0];
        Way script = Way.all().findFirst().orElseThrow().getPayload().fittedTo(trees(only).get(0));
        Files.writeString(temp.resolve("manifest.yaml"), only);
        Hook made = kubectl("patch", "--local", "-f", "manifest.yaml", "-o", "yaml", "--patch-file",
                Files.writeString(temp.resolve("prestop.yaml"), script.patch.toString()).getFileName().toString());
        assertThat(made.exitCode()).as(made.err().toString()).isZero();
        ObjectNode map = tree(DocsTest.read(Path.of("configmap.yaml")));
        trees(only).get(0).at("/metadata").valueStream().skip(1) // kubectl apply puts it into the same namespace
                .forEach(namespace -> ((ObjectNode) map.get("metadata")).set("namespace", namespace));
        assertRight(List.of(tree(String.join("\n", made.out())), map), trees(only), script);
    }

    private Hook kustomize(String manifest, Way way) throws IOException {
        Files.copy(Hook.SCRIPT, temp.resolve(Hook.SCRIPT.getFileName()));
        Files.writeString(temp.resolve("buildkitd.yaml"), manifest);
        for (int i = 0; i < way.files.size(); i++) {
            Files.writeString(temp.resolve(way.kustomization.at("/patches/" + i + "/path").asText()),
                    way.files.get(i).toString());
        }
        Files.writeString(temp.resolve("kustomization.yaml"), way.kustomization.toString());
        return kubectl("kustomize", ".");
    }

    /** The patch is in the first object, all else is as it was, and Kubernetes can run it. */
    private static void assertRight(List<JsonNode> made, List<JsonNode> manifest, Way way) {
        JsonNode target = manifest.get(0);
        JsonNode merged = made.stream().filter(each -> each.get("kind").equals(target.get("kind"))
                && each.get("metadata").equals(target.get("metadata"))).findFirst().orElseThrow();
        assertThat(made).as("the other objects").containsAll(manifest.subList(1, manifest.size()));
        JsonNode named = tree(merged.toString().replaceAll("(?<=\"buildkit-prestop)-\\w+(?=\")", ""));
        assertThat(holds(named, way.patch)).as("%s%nis not whole in %s", way.patch, merged).isTrue();
        assertThat(pod(merged).path("initContainers")).as("the sidecar, and nothing more in it")
                .containsAll(pod(way.patch).path("initContainers"));
        assertThat(names(pod(merged).path("volumes"))).filteredOn(name -> name.startsWith("prestop"))
                .containsExactlyInAnyOrderElementsOf(names(pod(way.patch).path("volumes")));
        assertThat(stripped(merged)).as("all else").isEqualTo(stripped(target));
        assertThat(buildkitd(merged).at("/lifecycle/preStop").fieldNames()).toIterable().containsExactly("exec");

        PodSpec pod = DocsTest.podOf(merged.toString());
        Stream.of(pod.getInitContainers(), pod.getContainers()).flatMap(List::stream).forEach(container -> {
            assertThat(container.getImage()).as(container.getName()).isNotEmpty();
            assertThat(pod.getVolumes()).extracting(Volume::getName)
                    .containsAll(container.getVolumeMounts().stream().map(VolumeMount::getName).toList());
        });
        assertThat(buildkitd(merged).at("/image").asText()).isEqualTo(way.kustomization.has("images")
                ? "example.com/buildkitd:" + way.kustomization.at("/images/0/newTag").asText()
                : "moby/buildkit:master");
        pod.getVolumes().stream().filter(volume -> volume.getConfigMap() != null).forEach(volume ->
                assertThat(made).as("the ConfigMap that the pod mounts").anyMatch(object ->
                        object.get("kind").asText().equals("ConfigMap")
                        && object.at("/metadata/name").asText().equals(volume.getConfigMap().getName())
                        && object.at("/metadata/namespace").equals(merged.at("/metadata/namespace"))
                        && object.at("/data/buildkit-prestop.java").asText().equals(DocsTest.read(Hook.SCRIPT))));
    }

    private static List<String> names(JsonNode list) {
        return list.valueStream().map(each -> each.get("name").asText()).toList();
    }

    /** The manifest without what a patch may add or change. */
    private static JsonNode stripped(JsonNode manifest) {
        JsonNode copy = manifest.deepCopy();
        pod(copy).remove(GRACE);
        List<JsonNode> containers = pod(copy).get("containers").valueStream()
                .sorted(Comparator.comparing(each -> each.get("name").asText())).toList();
        pod(copy).putArray("containers").addAll(containers); // kustomize puts them into an order of its own
        buildkitd(copy).remove(List.of("lifecycle", "image"));
        Stream.of(pod(copy).path("initContainers"), pod(copy).path("volumes"), buildkitd(copy).path("env"),
                buildkitd(copy).path("volumeMounts")).filter(JsonNode::isArray).forEach(list -> {
                    for (Iterator<JsonNode> items = list.iterator(); items.hasNext();) {
                        if (items.next().get("name").asText().matches("prestop.*|MAX_WAIT_SECONDS|WAIT_UNTIL_.*")) {
                            items.remove();
                        }
                    }
                });
        return tree(copy.toString().replaceAll("\"\\w+\":\\[],?", "").replace(",}", "}"));
    }

    /** Whether the whole has all that the part has; in lists of objects in any place; null stands for nothing. */
    private static boolean holds(JsonNode whole, JsonNode part) {
        if (part.isObject()) {
            return part.properties().stream().allMatch(field -> holds(whole.path(field.getKey()), field.getValue()));
        }
        if (part.path(0).isObject()) {
            return part.valueStream().allMatch(item -> whole.valueStream().anyMatch(other -> holds(other, item)));
        }
        return part.isNull() ? whole.isMissingNode() : whole.equals(part);
    }

    private static ObjectNode pod(JsonNode manifest) { return (ObjectNode) manifest.at("/spec/template/spec"); }

    /** The container with BuildKit in it; in a patch the only one. */
    private static ObjectNode buildkitd(JsonNode manifest) {
        JsonNode containers = pod(manifest).get("containers");
        return (ObjectNode) containers.valueStream().filter(each -> each.path("image").asText().contains("buildkit"))
                .findFirst().orElse(containers.get(0));
    }

    private static ObjectNode tree(String yaml) { return (ObjectNode) trees(yaml).get(0); }

    private static List<JsonNode> trees(String yaml) {
        return Stream.of(yaml.split("(?m)^---\n"))
                .map(text -> assertDoesNotThrow(() -> DocsTest.YAML.readTree(text))).toList();
    }

    /** Runs it in the temporary folder. */
    private Hook kubectl(String... arguments) {
        List<String> command = new ArrayList<>(List.of("env", "--chdir=" + temp, Tools.require("kubectl").toString()));
        command.addAll(List.of(arguments));
        Hook kubectl = Hook.run(command, Map.of("HOME", temp.toString()));
        kubectl.exitCode();
        return kubectl;
    }

    private static ObjectNode helmValues() { return tree(DocsTest.block("yaml", "preStop: false")); }

    // ---- Helm ------------------------------------------------------------------------------------------------------

    @Test
    void helmValuesAreThePatchsParts() {
        ObjectNode values = helmValues();
        ObjectNode patch = tree(DocsTest.saved("prestop.yaml"));
        assertThat(values.at("/lifecycle/preStop/exec")).isEqualTo(buildkitd(patch).at("/lifecycle/preStop/exec"));
        assertThat(values.get("extraVolumeMounts")).isEqualTo(buildkitd(patch).get("volumeMounts"));
        assertThat(values.at("/extraVolumes/0")).isEqualTo(pod(patch).at("/volumes/0"));
        assertThat(values.get(GRACE)).isEqualTo(pod(patch).get(GRACE));
        ObjectNode image = (ObjectNode) values.at("/initContainers/0");
        ObjectNode script = (ObjectNode) pod(patch).at("/initContainers/0");
        assertThat(holds(script.get("env"), image.get("env"))).isTrue();
        assertThat(image.get("volumeMounts")).isEqualTo(values.get("extraVolumeMounts"));
        assertThat(image.at("/command/1")).isEqualTo(script.at("/command/2"));
        for (JsonNode sidecar : List.of(image, script)) {
            ((ObjectNode) sidecar).remove(List.of("image", "command", "env", "resources", "volumeMounts"));
            ((ObjectNode) sidecar.get("startupProbe")).remove("periodSeconds");
        }
        assertThat(((ObjectNode) image.get("securityContext")).remove("readOnlyRootFilesystem").asBoolean()).isTrue();
        assertThat(image).isEqualTo(script);
    }

    @Test
    void valuesOfAChartThatTakesAnImageAndALifecycleAreThePatchs() {
        JsonNode values = tree(DocsTest.block("yaml", "image: {repository"));
        ObjectNode patch = tree(DocsTest.saved("baked.yaml"));
        String flags = " --max-wait-seconds=" + buildkitd(patch).at("/env/0/value").asText()
                + " --quiet-seconds=" + buildkitd(patch).at("/env/1/value").asText();
        assertThat(tree(values.get("lifecycle").toString().replace(flags, "")).at("/preStop/exec"))
                .isEqualTo(buildkitd(patch).at("/lifecycle/preStop/exec"));
        assertThat(values.get(GRACE)).isEqualTo(pod(patch).get(GRACE));
        assertThat(DocsTest.README).contains("newName: " + values.at("/image/repository").asText() + ", newTag: "
                + values.at("/image/tag").asText() + "}");
    }

    // ---- The image's command and its preStop hook, run -------------------------------------------------------------

    /** Makes a stub that notes its arguments and Java's variables, and ends as the file "code" says. */
    private void makeStub(String name, int code) throws IOException {
        Files.createDirectories(temp.resolve("bin"));
        Files.writeString(temp.resolve("code"), code + "\n");
        Tools.stub(temp.resolve("bin").resolve(name), """
                printf '%%s|' "$@" "$JAVA_TOOL_OPTIONS$JDK_JAVA_OPTIONS$_JAVA_OPTIONS" >>%1$s/calls
                echo >>%1$s/calls
                read code <%1$s/code
                exit $code
                """.formatted(temp));
    }

    @ParameterizedTest
    @ValueSource(strings = {"dash", "busybox ash"})
    void commandOfTheImagePassesItsArgumentsOnAndNoOptionOfAnotherJava(String shell) throws IOException {
        makeStub("java", 1);
        String command = DocsTest.found("(?s)<<'EOF' /usr/local/bin/buildkit-prestop\n(.*?\n)EOF\n", DocsTest.README)
                .get(0).replace("/opt/prestop/bin/", temp + "/bin/");
        Path file = Files.writeString(temp.resolve("command"), command);
        assertThat(run(shell, file.toString(), "--once", "--log-prefix=a  b").exitCode()).isEqualTo(1);
        assertThat(calls()).containsExactly(
                "-cp|/opt/prestop/hook:/opt/prestop/hook/*|BuildkitPrestop|--once|--log-prefix=a  b||");
    }

    @ParameterizedTest
    @CsvSource({"dash, 0", "dash, 124", "busybox ash, 0", "busybox ash, 124"})
    void hookThatCrashesOrCannotBeStartedIsStartedAgainUntilItsWaitIsOver(String shell, int end) throws IOException {
        makeStub("buildkit-prestop", 1);
        Path gone = Files.move(temp.resolve("bin/buildkit-prestop"), temp.resolve("bin/gone"));
        JsonNode command = buildkitd(tree(DocsTest.saved("baked.yaml"))).at("/lifecycle/preStop/exec/command");
        assertThat(command.valueStream().limit(2).map(JsonNode::asText)).containsExactly("sh", "-c");
        try (Hook wait = run(shell, "-c", command.get(2).asText())) {
            Hook.waitUntil("it cannot be started", () -> wait.err().size() >= 2);
            Files.move(gone, temp.resolve("bin/buildkit-prestop"));
            Hook.waitUntil("it is started again", () -> calls().size() >= 2);
            assertThat(wait.process().isAlive()).isTrue();
            Files.writeString(temp.resolve("code.new"), end + "\n");
            Files.move(temp.resolve("code.new"), temp.resolve("code"), StandardCopyOption.REPLACE_EXISTING);
            int before = calls().size();
            Hook.waitUntil("it ends", () -> !wait.process().isAlive() || calls().size() > before + 2);
            assertThat(wait.process().isAlive()).as("it is started again though its wait is over").isFalse();
            assertThat(wait.exitCode()).as("another one makes an event FailedPreStopHook").isZero();
        }
    }

    // ---- See it work -----------------------------------------------------------------------------------------------

    @ParameterizedTest
    @CsvSource({"pod/first, '', false", "pod/first, 0, false", "pod/first, 2, true", "'', '', false"})
    void seeItWorkDeletesThePodOnlyWhenABuildRunsInItAndSaysSo(String pod, String builds, boolean deletes)
            throws IOException {
        Files.createDirectories(temp.resolve("bin"));
        Tools.stub(temp.resolve("bin/kubectl"), """
                echo "kubectl $*" >>%1$s/calls
                case "$*" in
                    "get pod -n default -l app=buildkitd -o name") echo "%2$s" && echo pod/second ;;
                    "exec -n default pod/first -c prestop -- jbang /opt/prestop/buildkit-prestop.java --once")
                        echo "%3$s" ;;
                    logs*) echo the log ;;
                esac
                """.formatted(temp, pod, builds));
        Hook shell = run("dash", "-c", DocsTest.block("sh", "kubectl delete"));
        assertThat(shell.exitCode()).isZero();
        assertThat(shell.out()).containsExactly(deletes ? "the log"
                : "FAILED: the hook sees no build in pod '" + pod + "'");
        assertThat(calls()).filteredOn(call -> call.contains(" delete "))
                .isEqualTo(deletes ? List.of("kubectl delete -n default pod/first --wait=false") : List.of());
    }

    @Test
    void seeItWorkNamesALineOfTheLog() {
        assertThat(DocsTest.found("shows `(Ready: waiting for a reader of )/prestop/quiet\\.`", DocsTest.README))
                .singleElement().satisfies(line -> assertThat(DocsTest.read(Hook.SCRIPT)).contains('"' + line + '"'));
    }

    // ---- Running ---------------------------------------------------------------------------------------------------

    /** Runs a shell that finds the stubs first. */
    private Hook run(String shell, String... arguments) {
        List<String> command = new ArrayList<>(List.of(shell.split(" ")));
        Tools.require(command.get(0));
        command.addAll(List.of(arguments));
        return Hook.run(command, Hook.env("PATH", temp.resolve("bin") + ":" + System.getenv("PATH"),
                "JAVA_TOOL_OPTIONS", "-Xbogus", "JDK_JAVA_OPTIONS", "-Xbogus", "_JAVA_OPTIONS", "-Xbogus"));
    }

    /** The calls of the stubs so far. */
    private List<String> calls() {
        Path calls = temp.resolve("calls");
        return Files.notExists(calls) ? List.of() : DocsTest.read(calls).lines().toList();
    }
}
